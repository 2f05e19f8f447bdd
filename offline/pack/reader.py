"""Opens a ResQ checkpoint folder, checks every tensor's name, shape and dtype, and hands tensors out one at a time."""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from offline.pack.expected import (
    attention_names,
    expected_tensors,
    meta_model,
    plain_config,
    quantized_linears,
)
from offline.pack.names import BASIS_FILE, CONFIG_FILE, INDEX_FILE, SINGLE_FILE, key_rotation_name
from offline.pack.tensors import TensorSpec, linear_from_tensors
from offline.quantize.mixed import QuantizedLinear
from offline.transformers_errors import TRANSFORMERS_ERRORS, reason
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite, QuantizationMetadata
from resq_vllm.formats.plan import linear_plan

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``. Raises ResQError naming the file when it is missing or holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ResQError(f"cannot read {path} ({error.strerror}); give a model folder that holds it") from error
    except ValueError as error:
        raise ResQError(f"{path} is not valid JSON ({error}); restore the file") from error
    if not isinstance(value, dict):
        raise ResQError(f"{path} holds no JSON object; restore the file")
    return value


def is_resq_checkpoint(directory: Path) -> bool:
    """Whether config.json in ``directory`` says that resq quantized it. Raises ResQError when there is none."""
    section = read_json(directory / CONFIG_FILE).get("quantization_config")
    return isinstance(section, dict) and section.get("quant_method") == "resq"


class ResQCheckpoint:
    """A checked, lazily read checkpoint.

    Attributes:
        directory: its folder.
        config: config.json as a dict.
        metadata: its ``quantization_config``.
        specs: dtype and shape of every tensor, by name.

    """

    def __init__(self, directory: Path) -> None:
        """Open ``directory`` and check it: files whole, tensors present, shapes and dtypes as metadata demands.

        Raises ResQError naming the file and the field or tensor that is wrong.
        """
        self.directory = Path(directory)
        self.config_path = self.directory / CONFIG_FILE
        self.config = read_json(self.config_path)
        section = self.config.get("quantization_config")
        if not isinstance(section, dict):
            raise ResQError(
                f"{self.config_path} has no quantization_config: this is no ResQ checkpoint; quantize the model first"
            )
        self.metadata = QuantizationMetadata.from_dict(section, str(self.config_path))
        self._files = self._open_shards()
        self._places = self._read_headers()
        self.specs = {name: self._spec(name) for name in self._places}
        self._validate()

    @cached_property
    def hf_config(self) -> PreTrainedConfig:
        """The architecture's transformers config, without quantization_config."""
        try:
            return plain_config(AutoConfig.from_pretrained(self.directory))
        except TRANSFORMERS_ERRORS as error:
            raise ResQError(
                f"{self.config_path}: transformers cannot read it ({reason(error)}); check the file"
            ) from error

    @cached_property
    def model(self) -> nn.Module:
        """The architecture on the meta device, for names and shapes."""
        return meta_model(self.hf_config, str(self.config_path))

    @cached_property
    def linears(self) -> dict[str, tuple[nn.Linear, LinearSite]]:
        """The packed linear modules in model order: module (on the meta device, for its shape) and site, by name."""
        return quantized_linears(self.model, self.metadata)

    @cached_property
    def attentions(self) -> list[str]:
        """Names of the attention modules in layer order."""
        return attention_names(self.model)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor. Raises ResQError when the checkpoint has none of that name."""
        if name not in self._places:
            raise ResQError(f"{self.directory} holds no tensor {name}; quantize the model again with this release")
        return self._files[self._places[name]].get_tensor(name)

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor in its file, from the header alone."""
        spec = self.specs[name]
        return math.prod(spec.shape) * (spec.dtype.itemsize if spec.dtype else 0)

    def linear(self, module: str) -> QuantizedLinear:
        """Read one packed linear module by its Hugging Face name, for all ranks together."""
        if module not in self.linears:
            raise ResQError(f"{self.directory} holds no packed linear module {module}; see config.json for the sites")
        linear, site = self.linears[module]
        plan = linear_plan(site, linear.in_features, self.metadata.head_dim)
        return linear_from_tensors(self.tensor, module, linear.out_features, site, plan)

    def key_rotation(self, layer: int) -> torch.Tensor | None:
        """U_C of ``layer``, float32 [head_dim, head_dim], or None where the KV cache is not packed."""
        name = key_rotation_name(self.attentions[layer])
        return self.tensor(name) if name in self._places else None

    @property
    def basis_path(self) -> Path | None:
        """The saved bases beside the model, or None."""
        path = self.directory / BASIS_FILE
        return path if path.is_file() else None

    def _open_shards(self) -> dict[str, Any]:
        index = self.directory / INDEX_FILE
        if index.exists():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise ResQError(f"{index} lacks the field weight_map; restore the file")
            names = sorted(set(weight_map.values()))
        else:
            names = [SINGLE_FILE]
        files: dict[str, Any] = {}
        for name in names:
            path = self.directory / name
            try:
                files[name] = safe_open(path, framework="pt").__enter__()
            except FileNotFoundError as error:
                raise ResQError(f"{path} is missing; copy the whole checkpoint again") from error
            except (OSError, SafetensorError) as error:
                raise ResQError(
                    f"{path} is truncated or no safetensors file ({error}); copy the checkpoint again"
                ) from error
        return files

    def _read_headers(self) -> dict[str, str]:
        return {name: file for file, handle in self._files.items() for name in handle.keys()}  # noqa: SIM118

    def _spec(self, name: str) -> TensorSpec:
        header = self._files[self._places[name]].get_slice(name)
        dtype = _DTYPES.get(header.get_dtype())
        if dtype is None:
            raise ResQError(
                f"{self.directory / self._places[name]}: tensor {name} has the dtype {header.get_dtype()}, "
                "which no ResQ checkpoint uses; quantize the model again with this release"
            )
        return TensorSpec(dtype, tuple(header.get_shape()))

    def _validate(self) -> None:
        expected = expected_tensors(self.model, self.metadata, str(self.config_path))
        for name, spec in expected.items():
            found = self.specs.get(name)
            if found is None:
                raise ResQError(f"{self.directory}: tensor {name} is missing; quantize the model again")
            if not spec.accepts(found):
                raise ResQError(
                    f"{self.directory / self._places[name]}: tensor {name} is {found} where config.json asks "
                    f"for {spec}; quantize the model again"
                )
        for name in self.specs:
            if name not in expected:
                raise ResQError(
                    f"{self.directory / self._places[name]}: tensor {name} belongs to no module of this model; "
                    "quantize the model again"
                )
