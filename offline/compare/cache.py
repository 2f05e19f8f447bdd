"""Finished rows on disk, by fingerprint: a killed comparison goes on where it was, a repeated one is instant."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from pydantic import JsonValue, ValidationError

from offline.compare.rows import Row
from resq_vllm import __version__
from resq_vllm.errors import ResQError

logger = logging.getLogger("resq")
_PACKAGES = ("torch", "transformers")
_ROOT = Path(__file__).resolve().parents[2]
# What a figure passes through. Tables, plots, reports and the command line only show it.
_SOURCES = ("offline", "resq_vllm")
_SHOWING = ("offline/compare/", "offline/report/", "offline/cli.py", "offline/inspect.py", "offline/card.py")


def fingerprint(
    model: Path,
    calibration: Iterable[torch.Tensor],
    evaluation: Mapping[str, Sequence[Sequence[int]]],
    settings: Mapping[str, JsonValue],
) -> str:
    """SHA-256 (hex) over everything that decides a row, the tool itself included.

    Args:
        model: the model's folder; all of its files count, by content.
        calibration: token ids, one integer tensor a sequence, in order.
        evaluation: token ids of the scored sequences by name of the text.
        settings: the method's name and its own settings.

    """
    parts = {
        "model": model_digest(model),
        "calibration": _digest(sequence.flatten().tolist() for sequence in calibration),
        "evaluation": {name: _digest(map(list, sequences)) for name, sequences in evaluation.items()},
        "settings": dict(settings),
        "tool": tool_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _digest(sequences: Iterable[list[int]]) -> str:
    total = hashlib.sha256()
    for sequence in sequences:
        total.update(json.dumps(sequence).encode() + b"\n")
    return total.hexdigest()


def model_digest(folder: Path) -> str:
    """SHA-256 (hex) of names and contents of a model folder's files."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    # Reading gigabytes once a run is enough; a file that changes gets another size or time.
    return _model_digest(tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@cache
def _model_digest(files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, size, _ in files:
        total.update(f"{Path(name).name}\0{size}\0".encode())
        with open(name, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@cache
def tool_digest() -> str:
    """SHA-256 (hex) of the version, the measuring source files, and the versions of the packages they compute with.

    The version alone does not tell two states of a working tree apart.
    """
    total = hashlib.sha256(__version__.encode())
    for package in _PACKAGES:
        total.update(f"{package} {importlib.metadata.version(package)}\n".encode())
    for source in _SOURCES:
        for path in sorted((_ROOT / source).rglob("*.py")):
            name = path.relative_to(_ROOT).as_posix()
            if not name.startswith(_SHOWING):
                total.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    return total.hexdigest()


class RowCache:
    """Rows as JSON files ``METHOD-FINGERPRINT.json`` in a folder, each whole or absent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get(self, method: str, key: str) -> Row | None:
        """The row saved under exactly this fingerprint, or None. A file that is no such row is logged and redone."""
        path = self._file(method, key)
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["fingerprint"] != key:
                return None
            row = Row.model_validate(content["row"])
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            logger.warning("%s cannot be used (%s): %s is measured again", path, type(error).__name__, method)
            return None
        return row if row.method == method else None

    def put(self, key: str, row: Row) -> None:
        """Save a row; raises ResQError when the folder cannot be written."""
        content = {"fingerprint": key, "row": row.model_dump(mode="json")}
        write_whole(self._file(row.method, key), json.dumps(content, indent=1) + "\n")

    def _file(self, method: str, key: str) -> Path:
        # The full fingerprint is inside: 16 digits in the name keep folders readable.
        return self.folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', method)}-{key[:16]}.json"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, with its folders; raises ResQError naming it when that cannot be done."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise ResQError(f"cannot write {path} ({error.strerror}); choose a writable output folder") from error
