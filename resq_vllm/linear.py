"""``ResQLinearMethod``: checkpoint tensors in, one ``ops.linear_planned`` call a layer out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from resq_vllm import cuda, fusion_cpu, low_rank, ops, wide_hadamard
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LinearSite
from resq_vllm.formats.plan import LinearPlan, linear_plan
from resq_vllm.hadamard import hadamard_matrix
from resq_vllm.log import log_once
from resq_vllm.memory import keep_freed_blocks, release_freed
from resq_vllm.quantized_linear import cuda_kernel
from resq_vllm.reference import weight_scale_rows
from resq_vllm.vllm_api import (
    ChannelQuantScaleParameter,
    LinearBase,
    LinearMethodBase,
    ModelWeightParameter,
    current_platform,
    get_current_vllm_config,
    get_tensor_model_parallel_rank,
    register_weight_loader_v2_supported_method,
)

if TYPE_CHECKING:
    from resq_vllm.config import ResQConfig

_DUMMY_SEED = 20241214
# One stream, a batch of decodes, a large one, a prefill: each may get another kernel.
LOGGED_TOKENS = (1, 16, 64, 2048)


@register_weight_loader_v2_supported_method
class ResQLinearMethod(LinearMethodBase):
    """A linear layer whose input columns are split into a low- and a high-precision part (see formats.plan).

    Checkpoint parameters, per rank (N outputs, K_l and K_h input columns): weight_low uint8 [N, K_l/2] (or int8
    [N, K_l] at 8 bits), weight_high int8 [N, K_h], weight_low_scale float32 [N], or [N, groups] with weight groups,
    weight_high_scale float32 [N], and low_rank_a, low_rank_b (resq_vllm.low_rank) where the site has a correction.
    After loading they are replaced by packed_weight (the kernel's own layout), weight_scales float32 [rows, N] (low
    part first), weight_sums int32, and the joined low_rank_a [K, k], low_rank_b [k, N] (None without correction).
    """

    def __init__(self, config: ResQConfig, site: LinearSite) -> None:
        self.config = config
        self.site = site

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the checkpoint's parameters, cut for this rank.

        Raises ResQError when the layer's input is not the one that was quantized, or when this rank's share of it does
        not hold whole heads, Hadamard blocks or weight groups.
        """
        site, prefix = self.site, layer.prefix
        if input_size != site.low + site.high:
            raise ResQError(
                f"{prefix}: quantization_config describes {site.low + site.high} input columns but the layer has "
                f"{input_size}; quantize the model again"
            )
        try:
            plan = linear_plan(site, input_size_per_partition, self.config.metadata.head_dim)
        except ResQError as error:
            raise ResQError(f"{prefix}: {error}") from error
        outputs = sum(output_partition_sizes)
        loads = _Loads(
            layer, len(output_partition_sizes), input_size // plan.columns, extra_weight_attrs["weight_loader"]
        )
        low, high = plan.part_columns
        if low:
            columns, dtype = (low // 2, torch.uint8) if site.weight_low_bits == 4 else (low, torch.int8)
            _register(layer, loads, "weight_low", torch.empty(outputs, columns, dtype=dtype))
            groups = (plan.scale_rows - 1,) if plan.weight_group else ()
            _register(layer, loads, "weight_low_scale", torch.empty(outputs, *groups, dtype=torch.float32))
        if high:
            _register(layer, loads, "weight_high", torch.empty(outputs, high, dtype=torch.int8))
            _register(layer, loads, "weight_high_scale", torch.empty(outputs, dtype=torch.float32))
        if site.low_rank:
            low_rank.register(
                layer,
                loads.loader,
                extra_weight_attrs["weight_loader"],
                site.low_rank,
                plan.columns,
                input_size // plan.columns,
                output_partition_sizes,
                params_dtype,
            )
        layer.resq_plan, layer.resq_loads, layer.resq_output_sizes = plan, loads, list(output_partition_sizes)
        layer.resq_dtype = params_dtype
        engine = get_current_vllm_config()
        layer.resq_dummy = engine.load_config.load_format == "dummy"
        if current_platform.is_cuda():
            from resq_vllm.fusion_gpu import install

            self.config.fusion = install(engine)
        elif current_platform.is_cpu():
            fusion_cpu.install(engine)
        self.tally(plan, outputs, len(output_partition_sizes))

    def tally(self, plan: LinearPlan, outputs: int, modules: int) -> None:
        """Count this layer for the start-up line."""
        self.config.linear_bits.add(self.site, plan, outputs, modules)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Re-lay the weights for the kernels and free the checkpoint's tensors.

        Raises ResQError when the checkpoint lacked one of them.
        """
        if not hasattr(layer, "resq_loads"):
            return
        report(self.config, _device(layer))
        plan: LinearPlan = layer.resq_plan
        if layer.resq_dummy:
            _fill_dummy(layer, plan)
        else:
            layer.resq_loads.require_complete()
        low, high = _take(layer, "weight_low"), _take(layer, "weight_high")
        scales = [_take(layer, "weight_low_scale"), _take(layer, "weight_high_scale")]
        outputs = next(s.shape[0] for s in scales if s is not None)
        layer.resq_segments = segments = plan.flat_segments()
        packed, sums = ops.pack_weight(low, high, self.site.weight_low_bits, outputs, segments, plan.weight_group)
        if packed.device.type == "cuda":
            log_kernels(plan, outputs, self.site.weight_low_bits, packed.device)
        layer.resq_plan_tensor = ops.plan_tensor(segments, plan.group_bits, plan.hadamard_groups, plan.weight_group)
        low_scale, high_scale = (torch.zeros(outputs, device=packed.device) if s is None else s for s in scales)
        _parameter(layer, "packed_weight", packed)
        _parameter(layer, "weight_sums", sums)
        _parameter(layer, "weight_scales", weight_scale_rows(low_scale, high_scale))
        k = plan.hadamard_k
        _parameter(layer, "hadamard_k", hadamard_matrix(k).float().to(packed.device) if k > 1 else None)
        try:
            layer.resq_wide = wide_hadamard.needed(plan, packed.device, layer.resq_dtype)
        except ResQError as error:
            raise ResQError(f"{layer.prefix}: {error}") from error
        second = _take(layer, low_rank.SECOND)
        _parameter(layer, low_rank.FIRST, _take(layer, low_rank.FIRST))
        _parameter(layer, low_rank.SECOND, None if second is None else low_rank.join(second, layer.resq_output_sizes))
        del layer.resq_loads, low, high, scales
        release_freed()
        if packed.device.type == "cpu":
            keep_freed_blocks()

    def apply(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K] -> [..., N]: Hadamard, activation quantization and both GEMM parts in one op, then A and B."""
        weight = layer.packed_weight, layer.weight_scales, layer.weight_sums
        if x.device.type == "cpu":
            y = ops.linear_planned(x, *weight, bias, layer.resq_plan_tensor, layer.hadamard_k)
        else:
            # A plan on the CPU would keep the layer out of CUDA graphs.
            y = _linear_by_lists(layer, x, bias)
        return y if layer.low_rank_a is None else y + (x @ layer.low_rank_a) @ layer.low_rank_b


def _linear_by_lists(layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    weight = layer.packed_weight, layer.weight_scales, layer.weight_sums
    plan: LinearPlan = layer.resq_plan
    lists, n = (layer.resq_segments, plan.group_bits), layer.weight_scales.shape[1]
    if not layer.resq_wide:
        groups, dense = plan.hadamard_groups, layer.hadamard_k
        return ops.linear(x, *weight, bias, n, *lists, groups, dense, plan.weight_group)
    values = torch.ops.resq.wide_hadamard(x, plan.hadamard_groups, layer.hadamard_k)
    return ops.linear(values, *weight, bias, n, *lists, 0, None, plan.weight_group).to(x.dtype)


class _Loads:
    """The weight loader of a layer's parameters: vLLM's own, which also notes what has come and names what is wrong.

    vLLM does not check that a quantized checkpoint is complete, so a missing tensor would serve uninitialised memory.
    """

    def __init__(self, layer: LinearBase, shards: int, ranks: int, loader: Callable[..., None]) -> None:
        self._prefix = layer.prefix
        self._shards = shards
        self._ranks = ranks
        self._loader = loader
        self._seen: dict[str, set[object]] = {}

    def loader(self, name: str, place: Callable[..., None] | None = None) -> Callable[..., None]:
        """The weight loader of parameter ``name``: called (param, loaded_weight, shard id or nothing).

        ``place`` does it instead of vLLM's own, and takes any float type.
        """
        seen = self._seen[name] = set()

        def load(param: torch.nn.Parameter, loaded_weight: torch.Tensor, *shard: Any) -> None:
            converts = place is not None and loaded_weight.is_floating_point()
            if loaded_weight.dtype != param.dtype and not converts:
                raise ResQError(
                    f"{self._prefix}.{name} is {loaded_weight.dtype} in the checkpoint but the format stores "
                    f"{param.dtype}; quantize the model again"
                )
            wrong_shape = ResQError(
                f"{self._prefix}.{name} has shape {tuple(loaded_weight.shape)} in the checkpoint, which does not fit "
                "config.json; quantize the model again"
            )
            # vLLM cuts this rank's columns out of whatever is there: a tensor that is too wide would go unnoticed.
            columns = param.shape[-1] * self._ranks
            if place is None and loaded_weight.ndim == 2 and loaded_weight.shape[1] != columns:
                raise wrong_shape
            try:
                (place or self._loader)(param, loaded_weight, *shard)
            except (AssertionError, IndexError, KeyError, RuntimeError) as error:
                raise wrong_shape from error
            seen.add(shard[0] if shard else None)

        return load

    def require_complete(self) -> None:
        """Raise ResQError naming the first parameter that the checkpoint did not hold whole."""
        for name, seen in self._seen.items():
            if None not in seen and len(seen) < self._shards:
                raise ResQError(f"the checkpoint lacks all or part of {self._prefix}.{name}; quantize the model again")


def _register(layer: LinearBase, loads: _Loads, name: str, data: torch.Tensor) -> None:
    loader = loads.loader(name)
    if data.ndim == 1:
        parameter = ChannelQuantScaleParameter(data=data, output_dim=0, weight_loader=loader)
    else:
        parameter = ModelWeightParameter(data=data, input_dim=1, output_dim=0, weight_loader=loader)
    layer.register_parameter(name, parameter)


def _device(layer: LinearBase) -> torch.device:
    """Where the layer's checkpoint tensors were put."""
    return next(p.device for name in ("weight_low", "weight_high") if (p := getattr(layer, name, None)) is not None)


def _take(layer: LinearBase, name: str) -> torch.Tensor | None:
    """Remove parameter ``name`` from the layer and return its tensor (None where the part has no columns)."""
    if not hasattr(layer, name):
        return None
    data: torch.Tensor = getattr(layer, name).data
    delattr(layer, name)
    return data


def _parameter(layer: LinearBase, name: str, data: torch.Tensor | None) -> None:
    layer.register_parameter(name, None if data is None else torch.nn.Parameter(data, requires_grad=False))


def _fill_dummy(layer: LinearBase, plan: LinearPlan) -> None:
    """Random codes and scales for ``--load-format dummy``, which fills float tensors only: y keeps x's magnitude."""
    generator = torch.Generator(_device(layer)).manual_seed(_DUMMY_SEED)
    for name in ("weight_low", "weight_high"):
        if hasattr(layer, name):
            codes = getattr(layer, name).data
            info = torch.iinfo(codes.dtype)
            codes.random_(info.min, info.max + 1, generator=generator)
            bits = 8 if codes.dtype == torch.int8 else 4
            # Uniform b-bit codes have a standard deviation of 2^b/sqrt(12).
            getattr(layer, f"{name}_scale").data.fill_(12**0.5 / 2**bits / plan.columns**0.5)


def kernels_of(device: torch.device, fusion: str = "") -> str:
    """What the start-up line says of the kernels for weights on ``device``; fusion: what resq_vllm.fusion_gpu says.

    Raises ResQError with one sentence where the device is a GPU that the CUDA kernels of this build cannot run on.
    """
    if device.type != "cuda":
        return f"CPU kernels {ops.isa()}"
    index = device.index if device.index is not None else torch.cuda.current_device()
    cuda.require(index)
    return f"CUDA kernels on {torch.cuda.get_device_name(index)}; RMSNorm and SiLU·mul {fusion}"


def log_kernels(plan: LinearPlan, outputs: int, low_bits: int, device: torch.device) -> None:
    """One line a shape, on rank 0: which GEMM the table of csrc/cuda picks for few, some and many tokens."""
    if get_tensor_model_parallel_rank():
        return
    index = device.index if device.index is not None else torch.cuda.current_device()
    shape = (outputs, plan.flat_segments(), plan.group_bits, low_bits, index, plan.weight_group)
    chosen = ", ".join(f"{tokens} tokens {cuda_kernel(tokens, *shape)}" for tokens in LOGGED_TOKENS)
    log_once(logging.INFO, f"ResQ: linear {plan.columns} -> {outputs}: {chosen}")


def report(config: ResQConfig, device: torch.device) -> None:
    """The start-up line, once a process and on rank 0: kernels, bits of linears and lm_head, size of the KV cache."""
    kernels = kernels_of(device, config.fusion)
    if get_tensor_model_parallel_rank() == 0:
        from resq_vllm.kv_cache import describe

        # Not every pipeline stage has lm_head.
        head = f" lm_head {config.lm_head};" if config.lm_head else ""
        log_once(logging.INFO, f"ResQ: {kernels}; linear {config.linear_bits};{head} {describe(config)}")
