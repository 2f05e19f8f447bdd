"""ResQLMHeadMethod: this rank's rows of the vocabulary, padding, and the logits that vLLM makes of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from resq_vllm import config as config_module
from resq_vllm import linear as linear_module
from resq_vllm import ops, reference
from resq_vllm.config import ResQConfig
from resq_vllm.errors import ResQError
from resq_vllm.formats.plan import linear_plan
from resq_vllm.formats.weights import unpack_int4
from resq_vllm.linear import ResQLinearMethod
from resq_vllm.lm_head import FEW_TOKENS, BFloat16EmbeddingMethod, ResQLMHeadMethod, float_name, is_lm_head
from tests.resq_vllm.conftest import HEAD_DIM, HIDDEN, VOCAB, quantization_config

Tensors = dict[str, torch.Tensor]
EIGHT: dict[str, Any] = {"format_version": 3, "lm_head_bits": 8}
FOUR: dict[str, Any] = {"format_version": 4, "lm_head_bits": 4}
HIGH = 16


@pytest.fixture(params=[EIGHT, FOUR], ids=["8 bits", "4 bits"])
def config(request: pytest.FixtureRequest) -> ResQConfig:
    return ResQConfig.from_config(quantization_config(**request.param))


@pytest.fixture
def four_bits() -> ResQConfig:
    return ResQConfig.from_config(quantization_config(**FOUR))


def low_columns(config: ResQConfig) -> int:
    return HIDDEN - HIGH if config.metadata.lm_head_bits == 4 else 0


def head_of(config: ResQConfig, prefix: str = "lm_head", vocab: int = VOCAB) -> Any:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    return ParallelLMHead(vocab, HIDDEN, quant_config=config, prefix=prefix)


def stored(config: ResQConfig, vocab: int = VOCAB) -> Tensors:
    """Random checkpoint tensors of the whole vocabulary."""
    g = torch.Generator().manual_seed(0)
    low = low_columns(config)
    tensors = {
        "weight_high": torch.randint(-128, 128, (vocab, HIDDEN - low), generator=g, dtype=torch.int8),
        "weight_high_scale": torch.rand(vocab, generator=g) * 0.01 + 0.001,
    }
    if low:
        tensors["weight_low"] = torch.randint(0, 256, (vocab, low // 2), generator=g, dtype=torch.uint8)
        tensors["weight_low_scale"] = torch.rand(vocab, generator=g) * 0.1 + 0.01
    return tensors


def load(layer: Any, tensors: Tensors) -> None:
    for name, tensor in tensors.items():
        parameter = getattr(layer, name)
        parameter.weight_loader(parameter, tensor)


def loaded(config: ResQConfig, vocab: int = VOCAB) -> Any:
    layer = head_of(config, vocab=vocab)
    load(layer, stored(config, vocab))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(tokens: int = 5) -> torch.Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(7))


def expected(config: ResQConfig, x: torch.Tensor, vocab: int = VOCAB) -> torch.Tensor:
    """Logits of the whole vocabulary by the specification."""
    site = config.metadata.lm_head_site
    assert site is not None
    tensors, low, scale = stored(config, vocab), torch.empty(vocab, 0, dtype=torch.int8), torch.zeros(vocab)
    if site.low:
        low, scale = unpack_int4(tensors["weight_low"]), tensors["weight_low_scale"]
    high = tensors["weight_high"], tensors["weight_high_scale"]
    return reference.linear(x, low, high[0], scale, high[1], linear_plan(site, HIDDEN, HEAD_DIM))


def test_quantized_head_gets_its_method_and_nothing_else_does(process_group: None, config: ResQConfig) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        UnquantizedEmbeddingMethod,
        VocabParallelEmbedding,
    )

    assert isinstance(head_of(config).quant_method, ResQLMHeadMethod)
    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, quant_config=config, prefix="model.embed_tokens")
    assert isinstance(embedding.quant_method, UnquantizedEmbeddingMethod)
    assert not is_lm_head(embedding, "lm_head")
    down = RowParallelLinear(256, HIDDEN, bias=False, quant_config=config, prefix="model.layers.0.mlp.down_proj")
    assert type(down.quant_method) is ResQLinearMethod
    draft = head_of(config, prefix="model.draft_head")
    assert isinstance(draft.quant_method, UnquantizedEmbeddingMethod)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("vocab", [VOCAB, 100, 128])
def test_ranks_hold_the_vocabulary_in_turn(
    rank_of: Callable[[int, int], None], config: ResQConfig, size: int, vocab: int
) -> None:
    x = inputs()
    shares = []
    for rank in range(size):
        rank_of(rank, size)
        layer = loaded(config, vocab)
        assert layer.num_embeddings_per_partition == 128 // size
        shares.append(layer.quant_method.apply(layer, x, bias=None))
    logits = torch.cat(shares, -1)
    # Bit for bit: no Hadamard.
    assert torch.equal(logits[:, :vocab], expected(config, x, vocab))
    # What vLLM padded up to a multiple of 64 is a plain 0, as with a 16-bit head.
    assert torch.equal(logits[:, vocab:], torch.zeros(len(x), 128 - vocab))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_processor_cuts_the_padding_off(
    rank_of: Callable[[int, int], None], config: ResQConfig, dtype: torch.dtype
) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    rank_of(0, 1)
    layer, x = loaded(config), inputs().to(dtype)
    processor = LogitsProcessor(VOCAB)
    logits = processor(layer, x)
    assert logits.shape == (5, VOCAB)
    assert logits.dtype == dtype
    assert torch.equal(logits, expected(config, x))
    assert torch.equal(processor.get_top_tokens(layer, x), expected(config, x).argmax(-1))


def test_bias_is_added(rank_of: Callable[[int, int], None], config: ResQConfig) -> None:
    rank_of(0, 1)
    layer, x = loaded(config), inputs()
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3))
    with_bias = layer.quant_method.apply(layer, x, bias)
    torch.testing.assert_close(with_bias, layer.quant_method.apply(layer, x) + bias)


def test_no_token_and_one_token(rank_of: Callable[[int, int], None], config: ResQConfig) -> None:
    rank_of(0, 1)
    layer, x = loaded(config), inputs()
    assert layer.quant_method.apply(layer, x[:0]).shape == (0, 128)
    assert torch.equal(layer.quant_method.apply(layer, x[3:4])[:, :VOCAB], expected(config, x)[3:4])


def test_checkpoint_tensors_are_freed(rank_of: Callable[[int, int], None], config: ResQConfig) -> None:
    rank_of(0, 1)
    layer = loaded(config)
    found = {name: parameter.nbytes for name, parameter in layer.named_parameters()}
    # Sums by run: one of high columns alone, or one a part.
    low, runs = low_columns(config), 2 if low_columns(config) else 1
    weights = 128 * (HIDDEN - low + low // 2)
    assert found == {"packed_weight": weights, "weight_scales": 2 * 128 * 4, "weight_sums": runs * 128 * 4}


def test_padding_of_a_four_bit_head_sums_to_nothing(rank_of: Callable[[int, int], None], four_bits: ResQConfig) -> None:
    rank_of(0, 1)
    layer = loaded(four_bits)
    assert bool((layer.weight_sums[:, :VOCAB] != 0).any(1).all())
    assert not bool(layer.weight_sums[:, VOCAB:].any())
    # Inputs far from 0, whose zero points are large: whatever a padded row's codes added up to would show.
    logits = layer.quant_method.apply(layer, inputs() + 100)
    assert torch.equal(logits[:, VOCAB:], torch.zeros(5, 128 - VOCAB))


@pytest.mark.parametrize("name", ["weight_low", "weight_low_scale", "weight_high", "weight_high_scale"])
def test_missing_tensor_is_named(rank_of: Callable[[int, int], None], four_bits: ResQConfig, name: str) -> None:
    rank_of(0, 1)
    layer = head_of(four_bits)
    load(layer, {key: tensor for key, tensor in stored(four_bits).items() if key != name})
    with pytest.raises(ResQError, match=rf"the checkpoint lacks all or part of lm_head.{name}; quantize"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("name", "width", "dtype"), [("low", (HIDDEN - HIGH) // 2, torch.uint8), ("high", 16, torch.int8)]
)
def test_tensor_of_the_wrong_shape_or_type_is_named(
    rank_of: Callable[[int, int], None], four_bits: ResQConfig, name: str, width: int, dtype: torch.dtype
) -> None:
    rank_of(0, 1)
    layer = head_of(four_bits)
    for shape in ((VOCAB - 1, width), (VOCAB, 2 * width)):
        words = rf"lm_head.weight_{name} has shape \({shape[0]}, {shape[1]}\) in the checkpoint"
        with pytest.raises(ResQError, match=words):
            load(layer, {f"weight_{name}": torch.zeros(shape, dtype=dtype)})
    with pytest.raises(ResQError, match=rf"lm_head.weight_{name} is torch.bfloat16 in the checkpoint"):
        load(layer, {f"weight_{name}": torch.zeros(VOCAB, width, dtype=torch.bfloat16)})


def test_tied_embedding_is_refused(rank_of: Callable[[int, int], None], config: ResQConfig) -> None:
    rank_of(0, 1)
    with pytest.raises(ResQError, match="lm_head: a quantized lm_head cannot share the embedding's weights"):
        head_of(config).tie_weights(torch.nn.Module())


def test_dummy_weights_give_finite_logits(rank_of: Callable[[int, int], None], config: ResQConfig) -> None:
    from vllm.config import DeviceConfig, LoadConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.model_loader.weight_utils import initialize_single_dummy_weight

    rank_of(0, 1)
    vllm_config = VllmConfig(device_config=DeviceConfig(device="cpu"), load_config=LoadConfig(load_format="dummy"))
    with set_current_vllm_config(vllm_config):
        layer = head_of(config)
    for parameter in layer.parameters():
        initialize_single_dummy_weight(parameter)
    layer.quant_method.process_weights_after_loading(layer)
    y = layer.quant_method.apply(layer, inputs(64))
    assert torch.isfinite(y).all()
    assert 0.3 < float(y.std()) < 3.0


@pytest.mark.parametrize(
    ("changes", "dtype", "words"),
    [
        (EIGHT, torch.bfloat16, "linear none; lm_head W8A8; KV"),
        (FOUR, torch.bfloat16, "linear none; lm_head W4.50A8; KV"),
        ({}, torch.bfloat16, "linear none; lm_head bf16; KV"),
        ({}, torch.float32, "linear none; lm_head float32; KV"),
    ],
)
def test_start_up_line_says_how_the_head_is_kept(
    rank_of: Callable[[int, int], None],
    default_dtype: Callable[[torch.dtype], None],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    dtype: torch.dtype,
    words: str,
) -> None:
    rank_of(0, 1)
    default_dtype(dtype)
    config = ResQConfig.from_config(quantization_config(**changes))
    head_of(config)
    default_dtype(torch.float64)
    config.get_quant_method(head_of(config), "lm_head")
    lines: list[tuple[int, str]] = []
    monkeypatch.setattr(linear_module, "log_once", lambda level, message: lines.append((level, message)))
    linear_module.report(config, torch.device("cpu"))
    assert [level for level, _ in lines] == [logging.INFO]
    assert words in lines[0][1]


def test_float_names() -> None:
    assert [float_name(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == ["bf16", "float16", "float32"]


def test_sixteen_bit_checkpoint_has_no_such_method() -> None:
    with pytest.raises(ResQError, match="lm_head is in 16 bits in this checkpoint"):
        ResQLMHeadMethod(ResQConfig.from_config(quantization_config()))


# --- a head in bfloat16 -----------------------------------------------------------------------------------------------
@pytest.fixture
def plain(rank_of: Callable[[int, int], None], default_dtype: Callable[[torch.dtype], None]) -> ResQConfig:
    """A checkpoint with a 16-bit head, served in bfloat16 on one rank."""
    rank_of(0, 1)
    default_dtype(torch.bfloat16)
    return ResQConfig.from_config(quantization_config())


def weight(vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(vocab, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float32).bfloat16()


def plain_head(config: ResQConfig, vocab: int = VOCAB) -> Any:
    layer = head_of(config, vocab=vocab)
    layer.weight.weight_loader(layer.weight, weight(vocab))
    layer.quant_method.process_weights_after_loading(layer)
    return layer


class Calls:
    """Counts the calls of ops.linear_bf16."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens: list[int] = []
        inner = ops.linear_bf16

        def call(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            self.tokens.append(x.shape[0])
            return inner(x, weight, bias)

        monkeypatch.setattr(ops, "linear_bf16", call)


def test_few_tokens_take_our_kernel_and_more_torchs(plain: ResQConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    calls, layer = Calls(monkeypatch), plain_head(plain)
    assert type(layer.quant_method) is BFloat16EmbeddingMethod
    processor = LogitsProcessor(VOCAB)
    for tokens in (1, FEW_TOKENS, FEW_TOKENS + 1, 0):
        x = inputs(tokens).bfloat16()
        logits = processor(layer, x)
        assert logits.shape == (tokens, VOCAB)
        torch.testing.assert_close(logits, reference.linear_bf16(x, weight()))
    assert calls.tokens == [1, FEW_TOKENS, 0]


def test_other_inputs_take_torchs_product(plain: ResQConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, layer, x = Calls(monkeypatch), plain_head(plain), inputs(1).bfloat16()
    apply = layer.quant_method.apply
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: torch.zeros(()))
    assert apply(layer, x.float()).ndim == 0
    assert apply(layer, x, torch.zeros(128, dtype=torch.float32)).ndim == 0
    assert not calls.tokens
    bias = torch.randn(128, generator=torch.Generator().manual_seed(3)).bfloat16()
    assert torch.equal(apply(layer, x, bias)[:, :VOCAB], reference.linear_bf16(x, layer.weight, bias)[:, :VOCAB])
    assert calls.tokens == [1]


def test_embedding_and_head_keep_one_copy_of_their_weight(plain: ResQConfig) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, quant_config=plain, prefix="model.embed_tokens")
    embedding.weight.weight_loader(embedding.weight, weight())
    embedding.quant_method.process_weights_after_loading(embedding)
    for layer in (embedding, plain_head(plain)):
        assert type(layer.quant_method) is BFloat16EmbeddingMethod
        assert not hasattr(layer, "cpu_linear")  # where vLLM keeps the re-laid copy
    assert torch.equal(embedding(torch.tensor([3, 0])), weight()[[3, 0]])


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_hold_their_rows_of_a_bfloat16_head(
    plain: ResQConfig, rank_of: Callable[[int, int], None], size: int
) -> None:
    x, shares = inputs(2).bfloat16(), []
    for rank in range(size):
        rank_of(rank, size)
        layer = plain_head(plain, 100)
        shares.append(layer.quant_method.apply(layer, x))
    logits = torch.cat(shares, -1)
    torch.testing.assert_close(logits[:, :100], reference.linear_bf16(x, weight(100)))
    assert torch.equal(logits[:, 100:], torch.zeros(2, 28, dtype=torch.bfloat16))


def test_a_tied_head_reads_the_embeddings_weight(plain: ResQConfig) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    embedding = VocabParallelEmbedding(VOCAB, HIDDEN, quant_config=plain, prefix="model.embed_tokens")
    embedding.weight.weight_loader(embedding.weight, weight())
    layer = head_of(plain).tie_weights(embedding)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.weight is embedding.weight
    assert sum(p.nbytes for p in layer.parameters()) == 128 * HIDDEN * 2
    x = inputs(1).bfloat16()
    torch.testing.assert_close(layer.quant_method.apply(layer, x)[:, :VOCAB], reference.linear_bf16(x, weight()))


@pytest.mark.parametrize(
    ("dtype", "words"),
    [
        (torch.bfloat16, "lm_head runs on our kernel up to 4 tokens a step"),
        (torch.float16, "lm_head runs on vLLM's own product, since ours for few tokens takes bf16, not float16"),
    ],
)
def test_log_says_which_product_runs(
    plain: ResQConfig,
    default_dtype: Callable[[torch.dtype], None],
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    words: str,
) -> None:
    default_dtype(dtype)
    lines: list[str] = []
    monkeypatch.setattr(config_module, "log_once", lambda level, message: lines.append(message))
    layer = head_of(plain)
    assert isinstance(layer.quant_method, BFloat16EmbeddingMethod) == (dtype == torch.bfloat16)
    assert len(lines) == 1
    assert words in lines[0]
