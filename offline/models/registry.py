"""Which adapter serves which architecture."""

from __future__ import annotations

from typing import Any

from offline.models.adapter import ModelAdapter
from offline.models.llama import LlamaAdapter
from offline.models.mistral import MistralAdapter
from offline.models.qwen2 import Qwen2Adapter
from offline.models.qwen3 import Qwen3Adapter
from resq_vllm.errors import ResQError

ADAPTERS: dict[str, type[ModelAdapter]] = {
    adapter.architecture: adapter for adapter in (LlamaAdapter, MistralAdapter, Qwen2Adapter, Qwen3Adapter)
}


def adapter_class(architectures: object, source: str = "config.json") -> type[ModelAdapter]:
    """The adapter class for config.json's ``architectures`` field.

    Raises ResQError that names the architecture and lists the supported ones.
    """
    supported = ", ".join(sorted(ADAPTERS))
    if not isinstance(architectures, list) or not architectures:
        raise ResQError(f"{source}: field architectures is missing or empty; set it to one of {supported}")
    name = str(architectures[0])
    if name not in ADAPTERS:
        raise ResQError(f"{source}: architecture {name} is not supported; supported are {supported}")
    return ADAPTERS[name]


def adapter_for(config: Any, source: str = "config.json") -> ModelAdapter:
    """The adapter of a transformers config; raises ResQError for an unsupported architecture."""
    return adapter_class(getattr(config, "architectures", None), source)(config)
