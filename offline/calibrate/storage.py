"""Safetensors files with metadata, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from resq_vllm.errors import ResQError

METADATA_KEY = "resq"


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write to a temporary file beside ``path`` and rename, so that an interrupted write leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=path.name, suffix=".tmp", dir=path.parent)
    os.close(handle)
    try:
        # One entry: safetensors writes several in random order, and the same run must give the same bytes.
        header = {METADATA_KEY: json.dumps(dict(metadata), sort_keys=True)}
        save_file({name: value.contiguous() for name, value in tensors.items()}, temporary, header)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_tensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata says ``kind``.

    Raises ResQError when the file is missing, truncated or of another kind.
    """
    if not path.is_file():
        raise ResQError(f"{path}: no such file; run the step that writes it")
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ResQError(
            f"{path}: truncated or no safetensors file ({error}); delete it and run the step again"
        ) from error
    if metadata.get("kind") != kind:
        raise ResQError(f"{path}: holds {metadata.get('kind', 'no')} data, not {kind}; give the file of that step")
    return tensors, metadata
