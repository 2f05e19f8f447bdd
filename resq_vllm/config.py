"""``ResQConfig``: vLLM's view of a ResQ checkpoint, and the choice of a method for every layer."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import QUANT_METHOD, LinearSite, QuantizationMetadata, SiteName
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.log import log_once
from resq_vllm.spinning import shorten_spinning
from resq_vllm.vllm_api import QuantizationConfig, current_platform, get_tensor_model_parallel_rank

if TYPE_CHECKING:
    from resq_vllm.kv_cache import ResQKVCacheMethod
    from resq_vllm.linear import ResQLinearMethod
    from resq_vllm.lm_head import BFloat16EmbeddingMethod, ResQLMHeadMethod

# The last component of a module's name -> the site whose quantization it has. Fused vLLM layers and their HF parts.
SITE_OF_MODULE: dict[str, SiteName] = {
    "qkv_proj": "qkv",
    "q_proj": "qkv",
    "k_proj": "qkv",
    "v_proj": "qkv",
    "o_proj": "o",
    "gate_up_proj": "gate_up",
    "gate_proj": "gate_up",
    "up_proj": "gate_up",
    "down_proj": "down",
}

_NOT_QUANTIZED = (
    "--quantization resq serves only checkpoints made by `resq quantize`, and this model's config.json has no "
    "quantization_config: quantize the model first, or leave --quantization out"
)


class ResQConfig(QuantizationConfig):
    """The parsed ``quantization_config`` of a checkpoint, and one method per layer made from it.

    vLLM builds it in the front end (from_config, maybe_update_config) and pickles it to the workers, where the layers
    ask it for their methods. Called without arguments, as vLLM does for ``--quantization resq`` on a model that was
    never quantized, it raises ResQError.
    """

    # The rotation of K is of no use to layers that keep vLLM's own cache: their tensors are skipped at load.
    _ignore_unexpected_suffixes = (*QuantizationConfig._ignore_unexpected_suffixes, ".key_rotation")

    def __init__(self, metadata: QuantizationMetadata | None = None) -> None:
        if metadata is None:
            raise ResQError(_NOT_QUANTIZED)
        super().__init__()
        self.metadata = metadata
        self.ignore = list(metadata.ignore)
        # Filled while a worker creates its layers: the KV decision per attention layer, and what the log line reports
        # (lm_head: "W8A8", "W4.50A8" or its float type).
        self.kv_layers: dict[str, KVDecision] = {}
        self.linear_bits = LinearBits()
        self.lm_head = ""
        # On a GPU: whether norm and activation go into quantization (resq_vllm.fusion_gpu).
        self.fusion = ""

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ResQConfig:
        """Parse ``quantization_config``. Raises ResQError naming the field that is wrong or unknown."""
        return cls(QuantizationMetadata.from_dict(config, "config.json quantization_config"))

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Check, in the front end, that kernels exist here and that the metadata fits the model's config.json.

        Workers inherit the environment of the front end: what their threads read from it is set here.
        """
        require_kernels()
        if current_platform.is_cpu():
            shorten_spinning()
        if hf_config is not None:
            check_model(self.metadata, hf_config, f"{model_name}/config.json")

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        self.ignore = hf_to_vllm_mapper.apply_list(self.ignore)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """The method of ``layer``, or None for one that keeps vLLM's own (a 16-bit KV cache; elsewhere than on CPUs in
        bfloat16 embeddings and a 16-bit lm_head).

        Raises ResQError for a layer that the checkpoint format does not cover.
        """
        from resq_vllm.lm_head import float_embedding_method, is_lm_head
        from resq_vllm.vllm_api import (
            AttentionLayerBase,
            LinearBase,
            RoutedExperts,
            UnquantizedLinearMethod,
            VocabParallelEmbedding,
        )

        if isinstance(layer, LinearBase):
            if self.is_ignored(prefix):
                return UnquantizedLinearMethod()
            return self._linear_method(prefix)
        if isinstance(layer, AttentionLayerBase):
            return self._kv_method(layer, prefix)
        if is_lm_head(layer, prefix):
            return self._lm_head_method()
        if isinstance(layer, VocabParallelEmbedding):
            return float_embedding_method(torch.get_default_dtype())[0]
        if isinstance(layer, RoutedExperts) and not self.is_ignored(prefix):
            raise ResQError(f"{prefix}: the checkpoint format has no mixture-of-experts layers; serve a dense model")
        return None

    def is_ignored(self, prefix: str) -> bool:
        """Whether the checkpoint leaves module ``prefix`` in 16 bits. A fused layer goes by its parts, all or none."""
        head, _, last = prefix.rpartition(".")
        parts = [f"{head}.{part}".lstrip(".") for part in self.packed_modules_mapping.get(last, [])] or [prefix]
        hits = [any(p == name or p.startswith(f"{name}.") for name in self.ignore) for p in parts]
        if any(hits) and not all(hits):
            raise ResQError(f"{prefix}: the ignore list must name all or none of {', '.join(parts)}; quantize again")
        return all(hits)

    def _linear_method(self, prefix: str) -> ResQLinearMethod:
        from resq_vllm.linear import ResQLinearMethod

        return ResQLinearMethod(self, self.site(prefix))

    def _lm_head_method(self) -> ResQLMHeadMethod | BFloat16EmbeddingMethod | None:
        from resq_vllm.lm_head import ResQLMHeadMethod, float_embedding_method, float_name

        if self.metadata.lm_head_site is not None:
            return ResQLMHeadMethod(self)
        # vLLM makes the served dtype torch's default while it builds layers.
        dtype = torch.get_default_dtype()
        self.lm_head = self.lm_head or float_name(dtype)
        method, words = float_embedding_method(dtype)
        if words and get_tensor_model_parallel_rank() == 0:
            log_once(logging.INFO, f"ResQ: {words}")
        return method

    def site(self, prefix: str) -> LinearSite:
        """The quantization of the linear module ``prefix``. Raises ResQError for a module of no known site."""
        name = SITE_OF_MODULE.get(prefix.rpartition(".")[2])
        if name is None:
            raise ResQError(
                f"{prefix}: not one of {', '.join(SITE_OF_MODULE)} and not in the ignore list of quantization_config, "
                "so its format is unknown; quantize the model again with a release that knows this architecture"
            )
        return self.metadata.sites[name]

    def _kv_method(self, layer: torch.nn.Module, prefix: str) -> ResQKVCacheMethod | None:
        # vLLM asks again after loading: the answer is kept, since it rests on settings that are only current at first.
        decision = self.kv_layers.get(prefix)
        if decision is None:
            decision = self.kv_layers[prefix] = self._decide_kv(layer, prefix)
        return decision.method

    def _decide_kv(self, layer: torch.nn.Module, prefix: str) -> KVDecision:
        from resq_vllm.kv_cache import ResQKVCacheMethod, opt_out_reason
        from resq_vllm.vllm_api import extract_layer_index

        index = extract_layer_index(prefix)
        if index >= len(self.metadata.kv_cache):
            described = len(self.metadata.kv_cache)
            raise ResQError(f"{prefix}: quantization_config.kv_cache describes {described} layers only")
        kv = self.metadata.kv_cache[index]
        dtype = getattr(layer, "kv_cache_torch_dtype", torch.bfloat16)
        plain = KVDecision(getattr(layer, "num_kv_heads", 1), 2 * self.metadata.head_dim * dtype.itemsize)
        if kv.low_bits == 16:
            return plain
        reason = opt_out_reason(layer, index)
        if reason is not None:
            log_once(logging.WARNING, f"ResQ: vLLM's own KV cache is used, because {reason}")
            return plain
        layout = KVLayout(self.metadata.head_dim, kv.high, kv.low_bits)
        return KVDecision(plain.kv_heads, layout.bytes_per_token, layout, ResQKVCacheMethod(self, layout))


@dataclass(frozen=True)
class KVDecision:
    """How one attention layer keeps K and V: packed by ``method``, or (None) in vLLM's own cache.

    Attributes:
        kv_heads: heads on this rank.
        bytes_per_token: of K and V together, per head.
        layout: of the packed page.
        method: what vLLM gets.

    """

    kv_heads: int
    bytes_per_token: int
    layout: KVLayout | None = None
    method: ResQKVCacheMethod | None = None


class LinearBits:
    """Tally of the quantized linear layers: bits that weights and activations take on average."""

    def __init__(self) -> None:
        self.layers = 0
        self._weights = self._weight_bits = 0
        self._inputs = self._input_bits = 0

    def add(self, site: LinearSite, plan: LinearPlan, outputs: int, modules: int = 1) -> None:
        """One layer of ``outputs`` rows with this rank's ``plan``; inputs count over all ranks, at the plan's mean.

        ``modules``: how many the layer fuses, each with a low-rank correction of its own (16 bits an element).
        """
        low, high = plan.part_columns
        columns = site.low + site.high
        self.layers += 1
        self._weights += outputs * plan.columns
        self._weight_bits += outputs * (low * site.weight_low_bits + high * site.weight_high_bits)
        self._weight_bits += 16 * site.low_rank * (modules * plan.columns + outputs)
        self._inputs += columns
        self._input_bits += columns * sum(s.columns * plan.group_bits[s.group] for s in plan.segments) // plan.columns

    def __str__(self) -> str:
        if not self.layers:
            return "none"
        return f"W{self._weight_bits / self._weights:.2f}A{self._input_bits / self._inputs:.2f}"


def require_kernels() -> None:
    """Raise ResQError unless this machine's platform has kernels here and the compiled library loads."""
    from resq_vllm import cuda, ops

    if current_platform.is_cpu():
        ops.isa()
        return
    platform = f"vLLM runs on {current_platform.device_name} here"
    if not current_platform.is_cuda():
        raise ResQError(
            f"{platform}, and resq-vllm has kernels for CPUs and NVIDIA GPUs alone: serve with one of these"
        )
    module, reason = cuda.load()
    if module is None:
        raise ResQError(f"{platform}, but {reason}")


def check_model(metadata: QuantizationMetadata, hf_config: Any, source: str) -> None:
    """Raise ResQError unless the metadata's sizes are those of the model in ``hf_config`` (a transformers config)."""
    config = hf_config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    expected = {
        "head_dim": (metadata.head_dim, head_dim),
        "kv_cache (layers)": (len(metadata.kv_cache), config.num_hidden_layers),
        "sites.qkv (columns)": (_columns(metadata.sites["qkv"]), hidden),
        "sites.gate_up (columns)": (_columns(metadata.sites["gate_up"]), hidden),
        "sites.o (columns)": (_columns(metadata.sites["o"]), heads * head_dim),
        "sites.down (columns)": (_columns(metadata.sites["down"]), config.intermediate_size),
    }
    for field, (found, wanted) in expected.items():
        if found != wanted:
            raise ResQError(
                f"{source}: quantization_config.{field} is {found} but the model has {wanted}; quantize the model again"
            )
    for index, kv in enumerate(metadata.kv_cache):
        if kv.high >= head_dim:
            field = f"quantization_config.kv_cache.{index}.high"
            raise ResQError(f"{source}: {field} = {kv.high} does not fit head_dim {head_dim}; quantize the model again")
    if getattr(config, "tie_word_embeddings", False):
        raise ResQError(
            f"{source}: tie_word_embeddings must be false, since quantizing folds the final norm into lm_head alone; "
            "set it to false or quantize the model again"
        )


def _columns(site: LinearSite) -> int:
    return site.low + site.high
