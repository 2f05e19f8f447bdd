"""Writes a checkpoint layer by layer into a temporary folder beside the output, and renames it when it is whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from offline.pack.names import INDEX_FILE
from resq_vllm.errors import ResQError

# A shard is kept in memory until it is full.
DEFAULT_SHARD_BYTES = 1 << 30
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointWriter:
    """A context manager: leaving it before :meth:`finalise` (an error, Ctrl-C) removes everything written.

    ``add`` buffers tensors until a shard is full, so memory holds one shard at most. Shards are always listed in an
    index file, even a single one: loaders that glob ``*.safetensors`` then leave the saved bases alone.
    """

    def __init__(
        self, directory: Path, max_shard_bytes: int = DEFAULT_SHARD_BYTES, scratch: Path | None = None
    ) -> None:
        """Claim ``directory``. ``scratch``: a folder of the same disk for the temporary one, by default its parent.

        Raises ResQError when it exists already, when ``max_shard_bytes`` is not positive, or when its parent cannot be
        written.
        """
        self.directory = Path(os.path.abspath(directory))
        check_free(self.directory)
        if max_shard_bytes <= 0:
            raise ResQError(f"max_shard_bytes is {max_shard_bytes}; give a positive number of bytes")
        self._limit = max_shard_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._names: set[str] = set()
        parent = self.directory.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self.partial = Path(tempfile.mkdtemp(prefix=f"{self.directory.name}.partial-", dir=scratch or parent))
        except OSError as error:
            raise ResQError(f"cannot write to {parent} ({error.strerror}); choose another output folder") from error

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def abort(self) -> None:
        """Remove the temporary folder; nothing to do after :meth:`finalise`."""
        self._pending.clear()
        shutil.rmtree(self.partial, ignore_errors=True)

    def add(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Append tensors in order; a full shard goes to disk at once. Raises ResQError for a name given twice."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise ResQError(f"the tensor {name} was written twice to {self.directory}; each name must be unique")
            if self._pending and self._pending_bytes + tensor.nbytes > self._limit:
                self._flush()
            self._names.add(name)
            self._pending[name] = tensor
            self._pending_bytes += tensor.nbytes

    def write_tensors(self, filename: str, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
        """Write a separate safetensors file that is not part of the model (the bases), kept out of the index."""
        self._save(tensors, filename, metadata)

    def write_text(self, filename: str, text: str) -> None:
        """Write a UTF-8 text file."""
        with self._disk_errors():
            (self.partial / filename).write_text(text, encoding="utf-8")

    def write_json(self, filename: str, value: Mapping[str, Any]) -> None:
        """Write ``value`` as indented JSON."""
        self.write_text(filename, json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def copy(self, source: Path, filename: str | None = None) -> None:
        """Copy a file (a tokenizer's, a licence) under its own name or ``filename``."""
        with self._disk_errors():
            shutil.copyfile(source, self.partial / (filename or source.name))

    def finalise(self) -> Path:
        """Write the last shard and the index, rename the folder to its final name, and return that.

        Raises ResQError when another run has made the folder meanwhile, or when the disk is full.
        """
        self._flush()
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            final = f"model-{number + 1:05d}-of-{len(self._shards):05d}.safetensors"
            os.rename(self.partial / _shard_name(number), self.partial / final)
            weight_map.update(dict.fromkeys(names, final))
        self.write_json(INDEX_FILE, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        _usual_permissions(self.partial)
        try:
            check_free(self.directory)
        except ResQError:
            self.abort()
            raise
        with self._disk_errors():
            os.rename(self.partial, self.directory)
        return self.directory

    def _flush(self) -> None:
        if not self._pending:
            return
        self._save(self._pending, _shard_name(len(self._shards)), {"format": "pt"})
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0

    def _save(self, tensors: Mapping[str, torch.Tensor], filename: str, metadata: dict[str, str]) -> None:
        with self._disk_errors():
            save_file(_apart(tensors), self.partial / filename, metadata=metadata)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            self.abort()
            if is_disk_full(error):
                raise ResQError(
                    f"no space left on the disk of {self.directory.parent}; the partial output was removed: free some "
                    "space or choose an output folder on another disk"
                ) from error
            raise ResQError(
                f"cannot write to {self.directory.parent} ({error}); the partial output was removed: choose another "
                "output folder"
            ) from error


def check_free(directory: Path) -> None:
    """Raise ResQError when the output folder exists: called before any work, and again before the final rename."""
    if os.path.lexists(directory):
        raise ResQError(f"the output folder {directory} exists already; choose another name or remove it")


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each tensor in storage of its own: safetensors refuses views of a larger one and tensors that share (tied)."""
    seen: set[int] = set()
    result: dict[str, torch.Tensor] = {}
    for name, given in tensors.items():
        tensor = given.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def is_disk_full(error: Exception) -> bool:
    """Whether an error of the operating system or of safetensors says that the disk (or the quota) is used up."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # safetensors wraps the operating system's error into its own class and keeps only the text.
    return any(f"os error {code})" in str(error) for code in _DISK_FULL)


def _usual_permissions(folder: Path) -> None:
    """Temporary folders and safetensors files are born private; a checkpoint is as readable as any new file."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~umask)
