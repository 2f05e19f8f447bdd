"""The safetensors files of a model folder: one file or an index with shards, read tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from resq_vllm.errors import ResQError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class ShardReader:
    """Finds the file of each tensor and reads it; nothing is cached.

    The safetensors library checks files and gives shapes, but its tensors are pages of a mapped file, which stay in the
    process's memory after use until others need it. Tensors are read into memory of their own instead.
    """

    def __init__(self, folder: Path) -> None:
        """Opens every file's header; raises ResQError naming a missing, truncated or malformed file."""
        self._folder = folder
        self._open: dict[str, Any] = {}
        self._offsets: dict[str, dict[str, tuple[int, int]]] = {}
        if (folder / INDEX).is_file():
            self._map = self._read_index()
        elif (folder / SINGLE).is_file():
            self._map = dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        else:
            self._refuse_pickles()
        for shard in sorted(set(self._map.values())):
            present = set(self._handle(shard).keys())
            absent = sorted(name for name, file in self._map.items() if file == shard and name not in present)
            if absent:
                raise ResQError(
                    f"{folder / shard}: tensor {absent[0]} of {INDEX} is not in it; download the model again"
                )

    def _refuse_pickles(self) -> None:
        pickles = sorted(path.name for path in self._folder.glob("*.bin"))
        if pickles:
            raise ResQError(
                f"{self._folder}: has only pickled weights ({pickles[0]}); convert them to safetensors first "
                "(load the model with transformers and call save_pretrained)"
            )
        raise ResQError(f"{self._folder}: has neither {SINGLE} nor {INDEX}; download the model's weights")

    def _read_index(self) -> dict[str, str]:
        path = self._folder / INDEX
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            files = {str(name): str(file) for name, file in weight_map.items()}
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ResQError(f"{path}: not a safetensors index ({error!r}); download the file again") from error
        for file in sorted(set(files.values())):
            if Path(file).name != file:
                raise ResQError(f"{path}: names the shard {file!r} outside the folder; use an index with plain names")
            if not (self._folder / file).is_file():
                raise ResQError(f"{self._folder}: shard {file} named by {INDEX} is missing; download it again")
        return files

    def _handle(self, shard: str) -> Any:
        if shard not in self._open:
            path = self._folder / shard
            try:
                self._open[shard] = safe_open(str(path), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ResQError(f"{path}: truncated or no safetensors file ({error}); download it again") from error
        return self._open[shard]

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._map)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; raises ResQError when none does."""
        if name not in self._map:
            raise ResQError(f"{self._folder}: tensor {name} is missing; download the model again")
        return self._folder / self._map[name]

    def _slice(self, name: str) -> Any:
        return self._handle(self.file_of(name).name).get_slice(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header alone."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype; raises ResQError for anything but 16, 32 and 64-bit floats (such weights are quantized)."""
        stored = self._slice(name).get_dtype()
        if stored not in FLOATS:
            raise ResQError(
                f"{self.file_of(name)}: tensor {name} is stored as {stored}; give the 16-bit original model"
            )
        return FLOATS[stored]

    def read(self, name: str) -> torch.Tensor:
        """A tensor as stored, in memory of its own; raises ResQError when the file cannot be read any more."""
        dtype, path = self.dtype(name), self.file_of(name)
        value = torch.empty(self.shape(name), dtype=dtype)
        try:
            begin, end = self._data_offsets(path)[name]
            with path.open("rb") as file:
                file.seek(begin)
                if file.readinto(value.reshape(-1).view(torch.uint8).numpy().data) != end - begin:
                    raise OSError("the file ends before it")
        except (OSError, ValueError, KeyError) as error:
            raise ResQError(f"{path}: tensor {name} cannot be read ({error}); download it again") from error
        return value

    def _data_offsets(self, path: Path) -> dict[str, tuple[int, int]]:
        """First byte and end of every tensor in a file, whose header safetensors has checked."""
        if path.name not in self._offsets:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            data = 8 + length
            self._offsets[path.name] = {
                name: (data + entry["data_offsets"][0], data + entry["data_offsets"][1])
                for name, entry in header.items()
                if name != "__metadata__"
            }
        return self._offsets[path.name]
