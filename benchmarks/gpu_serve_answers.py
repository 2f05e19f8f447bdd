"""What a stage of benchmarks.gpu_serve has measured so far: a JSON file beside its report, written after every answer.

Kept are figures and failures that would come again; what ran out of time is not, and is measured when the stage is
called again. Where only the report's folder outlives a call, this file is all that the next one needs.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# The exit status of a stage that has more to measure (EX_TEMPFAIL of sysexits.h).
CALL_AGAIN = 75


def commit() -> str:
    """Whose code is measured, as benchmarks/gpu_serve.sh found out."""
    return os.environ.get("RESQ_COMMIT", "unknown")


class Answers:
    """Answers by name. changed: called after every one, to write the report anew."""

    def __init__(self, path: Path, changed: Callable[[], None] = lambda: None) -> None:
        self._path = path
        self._changed = changed
        self._kept: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def __getitem__(self, name: str) -> Any:
        return self._kept[name]

    def get(self, name: str, absent: Any = None) -> Any:
        return self._kept.get(name, absent)

    def put(self, name: str, answer: Any) -> None:
        """Keep an answer in place of an earlier one."""
        self._kept[name] = answer
        self._write()
        self._changed()

    def forget(self, names: Iterable[str] | None = None) -> None:
        """Drop these answers, or all."""
        for name in list(self._kept if names is None else names):
            self._kept.pop(name, None)
        self._write()

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(self._path.name + ".new")
        temporary.write_text(json.dumps(self._kept))
        temporary.rename(self._path)


def pack(archive: Path, files: Iterable[Path], root: Path) -> None:
    """A tar of files by their paths below ``root``, written whole or not at all."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = archive.with_name(archive.name + ".new")
    with tarfile.open(temporary, "w:gz") as target:
        for file in sorted(files):
            target.add(file, file.relative_to(root))
    temporary.rename(archive)


def unpack(archive: Path, root: Path) -> None:
    """Inverse of pack."""
    with tarfile.open(archive) as source:
        source.extractall(root, filter="data")
