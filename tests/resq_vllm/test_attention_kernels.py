"""Which platform has which kernels, how a GPU's batches are cut into launches, and the workspace they share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from resq_vllm import attention_kernels, reference
from resq_vllm.attention import ResQAttentionImpl, ResQMetadata, ResQMetadataBuilder, packed_backend
from resq_vllm.attention_kernels import CPUKernels, GPUKernels, Heads, kernels
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.vllm_api import AttentionCGSupport, CommonAttentionMetadata

LAYOUT = KVLayout(head_dim=64, high=8)
HEADS = Heads(8, 2, LAYOUT)
BLOCK = 16
# One sequence a row; pages in no order.
TABLE = torch.tensor([[3, 1, 6], [0, 5, 2], [7, 4, 8]], dtype=torch.int32)
WORKSPACE_BYTES = 4096


class ReferenceModule:
    """Stands in for resq_vllm.gpu_kv: the reference, and a record of the launches."""

    schedule = SimpleNamespace(DECODE_ROWS=16, prefill_tile=lambda head_dim: SimpleNamespace(rows=128))

    def __init__(self) -> None:
        self.launches: list[dict[str, Any]] = []
        self.planned: list[tuple[Any, ...]] = []
        self.warm: list[tuple[Any, ...]] = []

    def warm_up(self, *arguments: Any, num_sms: int) -> None:
        self.warm.append((*arguments, num_sms))

    def decode_kernel(self, *arguments: Any) -> str:
        return f"the kernel of {arguments}"

    def workspace_bytes(self, *arguments: Any, max_query_len: int) -> int:
        self.planned.append((*arguments, max_query_len))
        return WORKSPACE_BYTES

    def write_and_rotate(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
        slot_mapping: torch.Tensor,
        query_start_loc: torch.Tensor,
        rotation: torch.Tensor,
        high: int,
        low_bits: int,
    ) -> None:
        layout = KVLayout(LAYOUT.head_dim, high, low_bits)
        reference.kv_write(key[: len(slot_mapping)], value[: len(slot_mapping)], cache, slot_mapping, rotation, layout)
        covered = slice(int(query_start_loc[0]), int(query_start_loc[-1]))
        output[covered] = query[covered] @ rotation

    def attention(
        self,
        query: torch.Tensor,
        cache: torch.Tensor,
        output: torch.Tensor,
        block_table: torch.Tensor,
        seq_lens: torch.Tensor,
        query_start_loc: torch.Tensor,
        rotation: None,
        scale: float,
        high: int,
        low_bits: int,
        window: int,
        max_query_len: int,
        max_seq_len: int,
        workspace: torch.Tensor | None,
        *,
        num_sms: int,
    ) -> None:
        assert max_query_len >= (query_start_loc[1:] - query_start_loc[:-1]).max()
        assert max_seq_len >= seq_lens.max()
        first, last = int(query_start_loc[0]), int(query_start_loc[-1])
        output[first:last] = reference.attention(
            query[first:last],
            cache,
            block_table,
            seq_lens,
            query_start_loc - first,
            rotation,
            scale,
            KVLayout(LAYOUT.head_dim, high, low_bits),
            window,
        ).to(output.dtype)
        self.launches.append(
            {"sequences": len(seq_lens), "max_query_len": max_query_len, "workspace": workspace, "num_sms": num_sms}
        )


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ReferenceModule:
    found = ReferenceModule()
    monkeypatch.setattr(attention_kernels, "_gpu_kv", lambda: (found, ""))
    monkeypatch.setattr(attention_kernels, "multiprocessors", lambda device: 132)
    return found


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A platform whose answers the test sets; one NVIDIA GPU of compute capability 9.0 at first."""
    made = SimpleNamespace(
        device_name="cuda",
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        get_device_name=lambda: "H200",
        get_device_capability=lambda: SimpleNamespace(major=9, minor=0),
    )
    monkeypatch.setattr(attention_kernels, "current_platform", made)
    kernels.cache_clear()
    yield made
    kernels.cache_clear()


def test_cpu_platform_has_the_cpu_kernels() -> None:
    assert isinstance(kernels(), CPUKernels)
    assert kernels() is kernels()
    assert packed_backend(LAYOUT).get_preferred_block_size(16) == 16


def test_cuda_platform_has_the_gpu_kernels(platform: Any, module: ReferenceModule) -> None:
    assert isinstance(kernels(), GPUKernels)
    assert kernels().problem(HEADS) is None
    assert "Triton" in kernels().describe(torch.bfloat16, LAYOUT)
    assert packed_backend(LAYOUT).get_preferred_block_size(16) == 64


def test_other_platforms_are_refused(platform: Any) -> None:
    platform.is_cuda, platform.device_name = lambda: False, "xpu"
    with pytest.raises(ResQError, match=r"has kernels for CPUs and NVIDIA GPUs, not for xpu; serve with an explicit"):
        kernels()


@pytest.mark.parametrize(("chip", "found"), [((7, 5), "7.5"), (None, "unknown")])
def test_chip_before_ampere_is_named(
    platform: Any, module: ReferenceModule, chip: tuple[int, int] | None, found: str
) -> None:
    platform.get_device_name = lambda: "Tesla T4"
    platform.get_device_capability = lambda: None if chip is None else SimpleNamespace(major=chip[0], minor=chip[1])
    assert kernels().problem(HEADS) == f"Tesla T4 (compute capability {found}; its kernels need 8.0 or later)"


def test_more_query_heads_than_a_tile_has_rows_are_named(platform: Any, module: ReferenceModule) -> None:
    assert kernels().problem(Heads(128, 1, LAYOUT)) is None
    assert kernels().problem(Heads(129, 1, LAYOUT)) == "129 query heads for each KV head (at most 128)"


def test_missing_triton_is_named(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_kernels, "_gpu_kv", lambda: (None, "No module named 'triton'"))
    reason = kernels().problem(HEADS)
    assert reason == "a Python without Triton (No module named 'triton'; its kernels on GPUs are written in it)"
    with pytest.raises(ResQError, match=r"No module named 'triton'; install triton beside PyTorch"):
        kernels().reserve(torch.device("cpu"), HEADS, 8)


def builder(monkeypatch: pytest.MonkeyPatch, speculated: int = 0) -> ResQMetadataBuilder:
    import resq_vllm.attention as attention

    monkeypatch.setattr(attention, "require_all_packed", lambda config: None)
    monkeypatch.setattr(attention, "warm_up_layers", lambda *arguments: None)
    speculative = SimpleNamespace(num_speculative_tokens=speculated, parallel_drafting=False) if speculated else None
    config: Any = SimpleNamespace(
        speculative_config=speculative,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=True,
    )
    return ResQMetadataBuilder(None, ["layer"], config, torch.device("cpu"))


def common(query_lens: list[int], seq_lens: list[int], **changes: Any) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *torch.tensor(query_lens).cumsum(0).tolist()], dtype=torch.int32)
    count = len(query_lens)
    slots = [
        int(TABLE[i % 3, position // BLOCK]) * BLOCK + position % BLOCK
        for i, (queries, length) in enumerate(zip(query_lens, seq_lens, strict=True))
        for position in range(length - queries, length)
    ]
    fields: dict[str, Any] = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": torch.tensor(seq_lens, dtype=torch.int32),
        "num_reqs": count,
        "num_actual_tokens": sum(query_lens),
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "block_table_tensor": TABLE[[i % 3 for i in range(count)]],
        "slot_mapping": torch.tensor(slots),
    }
    return CommonAttentionMetadata(**{**fields, **changes})


def test_gpu_builder_wants_decodes_first_and_uniform_graphs(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder(monkeypatch)
    assert made.reorder_batch_threshold == 1
    support = ResQMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.UNIFORM_BATCH
    assert builder(monkeypatch, speculated=3).reorder_batch_threshold == 4


def test_cpu_builder_leaves_the_order_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    made = builder(monkeypatch)
    assert made.reorder_batch_threshold is None
    support = ResQMetadataBuilder.get_cudagraph_support(None, None)
    assert support is AttentionCGSupport.NEVER
    assert made.build(0, common([20], [20])).parts == ()


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "parts"),
    [
        ([1, 1, 1], [5, 9, 33], [(3, 1)]),
        ([7, 12], [7, 30], [(2, 12)]),
        ([1, 1, 12], [5, 9, 12], [(2, 1), (1, 12)]),
        # Padding of a captured batch: sequences without tokens.
        ([1, 1, 0], [5, 9, 0], [(3, 1)]),
    ],
)
def test_decodes_and_prefills_are_launches_of_their_own(
    platform: Any,
    monkeypatch: pytest.MonkeyPatch,
    query_lens: list[int],
    seq_lens: list[int],
    parts: list[tuple[int, int]],
) -> None:
    batch = builder(monkeypatch).build(0, common(query_lens, seq_lens))
    assert [(len(part.seq_lens), part.max_query_len) for part in batch.parts] == parts
    assert batch.max_seq_len == max(seq_lens)
    assert torch.cat([part.seq_lens for part in batch.parts]).tolist() == seq_lens


def test_verified_tokens_are_decodes(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = builder(monkeypatch, speculated=3).build(0, common([4, 4, 20], [9, 30, 20]))
    assert [(len(part.seq_lens), part.max_query_len) for part in batch.parts] == [(2, 4), (1, 20)]


def test_capture_builds_for_the_longest_context(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given = common([1, 1], [1, 1], max_seq_len=8192)
    batch = builder(monkeypatch).build_for_cudagraph_capture(given)
    assert batch.max_seq_len == 8192
    assert [part.max_query_len for part in batch.parts] == [1]
    # A replay reads the runner's own buffers.
    assert batch.parts[0].seq_lens.data_ptr() == given.seq_lens.data_ptr()
    assert batch.parts[0].query_start_loc is given.query_start_loc


def layer_and_impl() -> tuple[Any, ResQAttentionImpl]:
    g = torch.Generator().manual_seed(5)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=g))[0].contiguous()
    impl = packed_backend(LAYOUT).get_impl_cls()(8, 64, 0.125, 2)
    return SimpleNamespace(key_rotation=rotation), impl


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [3, 20, 7], [1, 1, 17]])
def test_gpu_launches_give_what_the_cpu_gives(
    platform: Any, module: ReferenceModule, monkeypatch: pytest.MonkeyPatch, query_lens: list[int]
) -> None:
    seq_lens, g = [34, 29, 40], torch.Generator().manual_seed(1)

    def rows(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, 64, generator=g)

    outputs = {}
    history, given = common(seq_lens, seq_lens), common(query_lens, seq_lens)
    old, new = (rows(sum(seq_lens), 2), rows(sum(seq_lens), 2)), (rows(sum(query_lens), 2), rows(sum(query_lens), 2))
    # Two rows of padding.
    query = rows(sum(query_lens) + 2, 8)
    for name in ("gpu", "cpu"):
        if name == "cpu":
            kernels.cache_clear()
            platform.is_cpu = lambda: True
        layer, impl = layer_and_impl()
        cache = torch.zeros(9, 2, BLOCK, LAYOUT.bytes_per_token, dtype=torch.uint8)
        reference.kv_write(*old, cache, history.slot_mapping, layer.key_rotation, LAYOUT)
        batch: ResQMetadata = builder(monkeypatch).build(0, given)
        outputs[name] = torch.full_like(query, 7.0)
        impl.forward(layer, query, *new, cache, batch, outputs[name])
    torch.testing.assert_close(outputs["gpu"], outputs["cpu"], rtol=2e-3, atol=2e-3)
    assert (outputs["gpu"][-2:] == 7.0).all()
    assert len(module.launches) == (2 if query_lens == [1, 1, 17] else 1)


def test_layers_share_a_workspace_made_at_load_time(platform: Any, module: ReferenceModule) -> None:
    gpu, device = GPUKernels(), torch.device("cpu")
    gpu.reserve(device, HEADS, 256)
    shared = gpu._workspaces[device]
    gpu.reserve(device, HEADS, 256)
    assert gpu._workspaces[device] is shared
    assert shared.dtype == torch.uint8
    assert shared.numel() == WORKSPACE_BYTES
    # 16 rows of the decode kernel hold 4 tokens of 4 query heads.
    assert module.planned[0] == (256, 8, 2, 64, 132, 4)


def test_kernels_are_compiled_for_each_kind_of_layer_before_vllm_captures(
    platform: Any, module: ReferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resq_vllm.attention as attention

    device, kv_spec = torch.device("cpu"), SimpleNamespace(block_size=BLOCK)
    gpu = kernels()
    assert isinstance(gpu, GPUKernels)
    gpu.reserve(device, HEADS, 256)
    layers = {
        name: SimpleNamespace(impl=SimpleNamespace(kernels=gpu, heads=HEADS, sliding_window=window))
        for name, window in (("a", -1), ("b", 512), ("c", -1))
    }
    asked: list[list[str]] = []

    def of_config(config: Any, kind: Any, names: list[str]) -> Any:
        asked.append(names)
        return layers

    monkeypatch.setattr(attention, "require_all_packed", lambda config: None)
    monkeypatch.setattr(attention, "get_layers_from_vllm_config", of_config)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(dtype=torch.bfloat16, max_model_len=4096),
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=True,
    )
    for _ in range(2):
        ResQMetadataBuilder(kv_spec, list(layers), config, device)
    assert asked == [["a", "b", "c"]] * 2
    sizes = torch.bfloat16, device, 8, 2, 64, 8, 4, BLOCK, LAYOUT.bytes_per_token
    workspace = gpu._workspaces[device]
    assert module.warm == [(*sizes, window, 4096, workspace, 132) for window in (-1, 512)]


def test_workspace_goes_to_every_launch(
    platform: Any, module: ReferenceModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, impl = layer_and_impl()
    kernels().reserve(torch.device("cpu"), impl.heads, 4)
    cache = torch.zeros(9, 2, BLOCK, LAYOUT.bytes_per_token, dtype=torch.uint8)
    given = common([1, 1, 17], [34, 29, 40])
    query, key, value = (torch.randn(19, heads, 64) for heads in (8, 2, 2))
    impl.forward(layer, query, key, value, cache, builder(monkeypatch).build(0, given), torch.empty_like(query))
    assert [launch["workspace"].numel() for launch in module.launches] == [WORKSPACE_BYTES] * 2
    assert all(launch["num_sms"] == 132 for launch in module.launches)


def test_backend_on_its_triton_kernels_gives_what_the_cpu_gives() -> None:
    """By Triton's interpreter, which is chosen for a whole process."""
    file = Path(__file__).with_name("checks_gpu_backend.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    child = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=600)
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    assert " passed" in child.stdout
