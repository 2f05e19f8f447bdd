"""Results of earlier runs, kept as long as nothing that they depend on has changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

SOURCE_SUFFIXES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh"})


def sources(folder: Path) -> Iterable[Path]:
    """Source files below a folder; compiled files and caches do not count."""
    return (path for path in folder.rglob("*") if path.suffix in SOURCE_SUFFIXES and path.is_file())


def fingerprint(files: Iterable[Path], facts: Mapping[str, object]) -> str:
    """SHA-256 (hex) over the contents of files and over facts such as versions; independent of their order."""
    total = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode())
    for path in sorted(set(files)):
        with path.open("rb") as stream:
            total.update(f"\0{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}".encode())
    return total.hexdigest()


class ResultCache:
    """JSON values by name, each beside the fingerprint of what it was computed from."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._entries: dict[str, dict[str, Any]] = json.loads(path.read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            self._entries = {}

    def valid(self, name: str, key: str) -> bool:
        """Whether `name` is kept for exactly this fingerprint."""
        return self._entries.get(name, {}).get("key") == key

    def get(self, name: str, key: str, compute: Callable[[], Any]) -> Any:
        """The kept value of `name` for this fingerprint, or `compute()`, which is then kept."""
        if not self.valid(name, key):
            self._entries[name] = {"key": key, "value": compute()}
            self._save()
        return self._entries[name]["value"]

    def forget(self, name: str) -> None:
        """Drop `name`, for a value whose files are gone."""
        if self._entries.pop(name, None) is not None:
            self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".new")
        temporary.write_text(json.dumps(self._entries, indent=1) + "\n")
        temporary.rename(self.path)
