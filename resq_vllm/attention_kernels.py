"""Which kernels write and attend over the packed KV cache: C++ on CPUs, Triton on NVIDIA GPUs. Chosen here alone.

The CPU's take a batch as it is. The GPU's (resq_vllm.gpu_kv) take what vLLM knows on the host as well, the longest
query and context, since a launch must not depend on what lies on the device; and a workspace, which is allocated when
the model is loaded, before vLLM measures what is left for the cache, once a device and shared by all its layers.
"""

from __future__ import annotations

import importlib
import time
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from resq_vllm import cuda, ops
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.log import logger
from resq_vllm.vllm_api import AttentionCGSupport, CommonAttentionMetadata, current_platform, split_decodes_and_prefills

if TYPE_CHECKING:
    from resq_vllm.attention import ResQMetadata


@dataclass(frozen=True)
class Part:
    """Neighbouring sequences of a batch that one launch attends for: their rows of the batch's tensors.

    query_start_loc int32 [S+1] counts rows of the whole batch; max_query_len: tokens of the longest query, or more.
    """

    block_table: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    max_query_len: int


@dataclass(frozen=True)
class Heads:
    """Sizes of one attention layer on this rank."""

    query: int
    kv: int
    layout: KVLayout

    @property
    def group(self) -> int:
        """Query heads that read one kv head."""
        return self.query // self.kv


class CPUKernels:
    """csrc/cpu: one call a batch, whatever is in it."""

    cudagraph_support = AttentionCGSupport.NEVER
    # vLLM's own choice for CPUs is a page of 128 tokens.
    preferred_block_size: int | None = None
    # Without one, the runner leaves the order of a batch alone.
    decode_query_len: int | None = None

    def problem(self, heads: Heads) -> str | None:
        """Why such a layer cannot be packed here, as an object of "does not support"; None when it can."""
        return None

    def describe(self, dtype: torch.dtype, layout: KVLayout) -> str:
        """For the start-up line."""
        return ops.attention_kernels(dtype, layout.head_dim, layout.high, layout.low_bits)

    def reserve(self, device: torch.device, heads: Heads, max_seqs: int) -> None:
        """The CPU's kernels keep their own scratch."""

    def warm_up(
        self, device: torch.device, dtype: torch.dtype, heads: Heads, block_size: int, window: int, max_seq_len: int
    ) -> None:
        """The CPU's kernels are compiled when the package is built."""

    def prepare(self, kv_cache: torch.Tensor) -> None:
        """Called once with every new cache."""
        if kv_cache.is_contiguous():
            ops.prefer_huge_pages(kv_cache)

    def plan(self, batch: ResQMetadata, common: CommonAttentionMetadata, decode_query_len: int) -> ResQMetadata:
        """What the metadata builder adds to a batch: nothing."""
        return batch

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        batch: ResQMetadata,
        rotation: torch.Tensor,
        scale: float,
        heads: Heads,
        window: int,
    ) -> None:
        """Write the batch's tokens and attend for them, as ops.kv_write_attention describes; padding is left alone."""
        if query.shape[0] != batch.tokens:  # two slices take 1.4 of a call's 9 microseconds
            query, output = query[: batch.tokens], output[: batch.tokens]
        ops.kv_write_attention(
            query,
            key,
            value,
            kv_cache,
            output,
            batch.slot_mapping,
            batch.block_table,
            batch.seq_lens,
            batch.query_start_loc,
            rotation,
            scale,
            heads.layout.high,
            heads.layout.low_bits,
            window,
        )


class GPUKernels:
    """resq_vllm.gpu_kv: decodes by split-K flash-decoding, everything else by a kernel over blocks of queries."""

    # What a launch does not read on the device, it takes from shapes and the longest query of a uniform batch.
    cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # Four tiles of 16 tokens: planes of a page are read in longer pieces than with vLLM's default of one tile.
    preferred_block_size: int | None = 64
    decode_query_len: int | None = 1

    def __init__(self) -> None:
        self._workspaces: dict[torch.device, torch.Tensor] = {}
        self._warm: set[tuple[object, ...]] = set()

    def problem(self, heads: Heads) -> str | None:
        name = current_platform.get_device_name()
        chip = current_platform.get_device_capability()
        if chip is None or (chip.major, chip.minor) < cuda.OLDEST_CHIP:
            found = "unknown" if chip is None else f"{chip.major}.{chip.minor}"
            return f"{name} (compute capability {found}; its kernels need 8.0 or later)"
        module, reason = _gpu_kv()
        if module is None:
            return f"a Python without Triton ({reason}; its kernels on GPUs are written in it)"
        most = module.schedule.prefill_tile(heads.layout.head_dim).rows
        return f"{heads.group} query heads for each KV head (at most {most})" if heads.group > most else None

    def describe(self, dtype: torch.dtype, layout: KVLayout) -> str:
        return "split-K flash-decoding (CUDA or Triton), prefill over unpacked blocks (Triton)"

    def reserve(self, device: torch.device, heads: Heads, max_seqs: int) -> None:
        """Allocate the workspace that decode batches of up to ``max_seqs`` sequences need; the largest layer decides.

        Later growth would leave a captured graph with a freed address, so this is for load time only.
        """
        # Every batch whose queries have few enough rows a kv head is decoded, speculated tokens included.
        rows = max(1, _module().schedule.DECODE_ROWS // heads.group)
        size = _module().workspace_bytes(
            max_seqs, heads.query, heads.kv, heads.layout.head_dim, multiprocessors(device), max_query_len=rows
        )
        present = self._workspaces.get(device)
        if size and (present is None or present.numel() < size):
            self._workspaces[device] = torch.empty(size, dtype=torch.uint8, device=device)

    def warm_up(
        self, device: torch.device, dtype: torch.dtype, heads: Heads, block_size: int, window: int, max_seq_len: int
    ) -> None:
        """Compile what such a layer's batches take, once for all layers alike; see gpu_kv.warm_up for the reason."""
        kind = device, dtype, heads, block_size, window, max_seq_len
        if kind in self._warm:
            return
        self._warm.add(kind)
        begin, layout = time.perf_counter(), heads.layout
        _module().warm_up(
            dtype,
            device,
            heads.query,
            heads.kv,
            layout.head_dim,
            layout.high,
            layout.low_bits,
            block_size,
            layout.bytes_per_token,
            window,
            max_seq_len,
            self._workspaces.get(device),
            num_sms=multiprocessors(device),
        )
        seconds = time.perf_counter() - begin
        page = layout.head_dim, layout.high, layout.low_bits, block_size
        used = _module().decode_kernel(*page, dtype, device)
        logger.info("ResQ: packed KV cache: decodes by %s; kernels compiled or loaded in %.1f s", used, seconds)

    def prepare(self, kv_cache: torch.Tensor) -> None:
        """A GPU's memory needs none."""

    def plan(self, batch: ResQMetadata, common: CommonAttentionMetadata, decode_query_len: int) -> ResQMetadata:
        """The batch in one part, or in two where decodes stand before prefills: each has its own kernel."""
        decodes = split_decodes_and_prefills(common, decode_threshold=decode_query_len)[0]
        table, lens, starts = batch.block_table, batch.seq_lens, batch.query_start_loc
        if 0 < decodes < common.num_reqs:
            parts: tuple[Part, ...] = (
                Part(table[:decodes], lens[:decodes], starts[: decodes + 1], decode_query_len),
                Part(table[decodes:], lens[decodes:], starts[decodes:], common.max_query_len),
            )
        else:
            parts = (Part(table, lens, starts, common.max_query_len),)
        batch.parts, batch.max_seq_len = parts, common.max_seq_len
        return batch

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        output: torch.Tensor,
        batch: ResQMetadata,
        rotation: torch.Tensor,
        scale: float,
        heads: Heads,
        window: int,
    ) -> None:
        """Write the batch's tokens and turn its queries, in one launch; attend for them. Padding is left alone."""
        module, workspace = _module(), self._workspaces.get(query.device)
        high, low_bits = heads.layout.high, heads.layout.low_bits
        to_write = query, key, value, kv_cache, output, batch.slot_mapping, batch.query_start_loc
        module.write_and_rotate(*to_write, rotation, high, low_bits)
        for part in batch.parts:
            module.attention(
                output,
                kv_cache,
                output,
                part.block_table,
                part.seq_lens,
                part.query_start_loc,
                None,
                scale,
                high,
                low_bits,
                window,
                part.max_query_len,
                batch.max_seq_len,
                workspace,
                num_sms=multiprocessors(query.device),
            )


@cache
def kernels() -> CPUKernels | GPUKernels:
    """The kernels of the platform that vLLM runs on here. Raises ResQError where there are none."""
    if current_platform.is_cpu():
        return CPUKernels()
    if current_platform.is_cuda():
        return GPUKernels()
    raise ResQError(
        f"the packed KV cache has kernels for CPUs and NVIDIA GPUs, not for {current_platform.device_name}; serve with "
        "an explicit --kv-cache-dtype (such as bfloat16) to use vLLM's own cache"
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU: how many programs a launch should at least have."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _gpu_kv() -> tuple[ModuleType | None, str]:
    """The Triton kernels, imported on GPUs alone; or None and why they cannot be."""
    try:
        return importlib.import_module("resq_vllm.gpu_kv"), ""
    except ImportError as error:
        return None, str(error)


def _module() -> ModuleType:
    module, reason = _gpu_kv()
    if module is None:
        raise ResQError(f"resq_vllm.gpu_kv cannot be imported: {reason}; install triton beside PyTorch")
    return module
