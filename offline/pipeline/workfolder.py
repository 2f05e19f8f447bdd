"""The folder of unfinished work beside the output: what a killed run leaves, and what --resume picks up.

``OUTPUT.resq-work/`` holds ``fingerprint.json`` (options, model files, calibration tokens, tool version) and one
safetensors file a finished step. Every file is written under another name and renamed, so it is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offline.pack.writer import is_disk_full
from resq_vllm.errors import ResQError

Record = TypeVar("Record", bound=BaseModel)


class WorkFolder:
    """Finished steps by name, each a dict of tensors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, output: Path) -> WorkFolder:
        return cls(output.with_name(output.name + ".resq-work"))

    def open(self, fingerprint: dict[str, object], resume: bool) -> None:
        """Start fresh, or continue a run with the same fingerprint.

        Raises ResQError when unfinished work is there and ``resume`` is off, or when it belongs to another run (the
        sentence names what differs).
        """
        record = self.path / "fingerprint.json"
        fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True))
        if not record.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            try:
                self.path.mkdir(parents=True)
                temporary = record.with_suffix(".tmp")
                temporary.write_text(json.dumps(fingerprint, indent=1, sort_keys=True))
                os.replace(temporary, record)
            except OSError as error:
                self.remove()
                raise ResQError(
                    f"cannot write to {self.path.parent} ({error.strerror}); choose another output folder"
                ) from error
            return
        if not resume:
            raise ResQError(f"{self.path} holds an unfinished run; add --resume to continue it, or delete that folder")
        found = json.loads(record.read_text())
        different = sorted(key for key in fingerprint.keys() | found.keys() if fingerprint.get(key) != found.get(key))
        if different:
            raise ResQError(
                f"{self.path} belongs to a run with another {', '.join(different)}; "
                "repeat that run's flags to resume it, or delete that folder to start anew"
            )

    def has(self, step: str) -> bool:
        return self._file(step).exists()

    def save(self, step: str, tensors: dict[str, torch.Tensor]) -> None:
        temporary = self.path / f"{step}.tmp"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        os.replace(temporary, self._file(step))

    def load(self, step: str) -> dict[str, torch.Tensor]:
        """Raises ResQError naming the file when it cannot be read."""
        try:
            return dict(load_file(self._file(step)))
        except (SafetensorError, OSError, ValueError) as error:
            raise ResQError(f"{self._file(step)} cannot be read ({error}); delete {self.path} to start anew") from error

    def save_record(self, step: str, record: BaseModel) -> None:
        """Small facts of a step beside its tensors; save these first, since the tensors mark the step as done."""
        file = self.path / f"{step}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(record.model_dump_json())
        os.replace(temporary, file)

    def load_record(self, step: str, kind: type[Record]) -> Record:
        """Raises ResQError naming the file when it cannot be read."""
        file = self.path / f"{step}.json"
        try:
            return kind.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            reason = error.strerror if isinstance(error, OSError) else error.errors()[0]["msg"]
            raise ResQError(f"{file} cannot be read ({reason}); delete {self.path} to start anew") from error

    def drop(self, step: str) -> None:
        self._file(step).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, step: str) -> Path:
        return self.path / f"{step}.safetensors"

    @contextlib.contextmanager
    def cleared_on_error(self, keep: bool) -> Iterator[None]:
        """Remove everything when the body fails, unless the user works with --resume; Ctrl-C always keeps it.

        Raises ResQError instead of the operating system's error when the disk is full.
        """
        try:
            yield
        except Exception as error:
            if not keep:
                self.remove()
            if isinstance(error, OSError | SafetensorError) and is_disk_full(error):
                left = f"{self.path} was kept for --resume" if keep else "nothing was left behind"
                raise ResQError(
                    f"no space left on the disk of {self.path.parent}; {left}: free some space or choose an output "
                    "folder on another disk"
                ) from error
            raise
