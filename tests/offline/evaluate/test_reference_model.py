"""The reference model of a checkpoint against one written out layer by layer with resq_vllm.reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from offline.evaluate.reference_model import load_reference_model
from offline.pack.reader import ResQCheckpoint
from resq_vllm import reference
from resq_vllm.errors import ResQError
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import QuantizationMetadata
from tests.offline.models.tiny import random_sequences, save_tiny
from tests.offline.pack.tiny_checkpoint import EIGHT_BIT_HEAD, METADATA, write_checkpoint

IDS = random_sequences([21])[0]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


def rope(x: torch.Tensor, theta: float) -> torch.Tensor:
    """x [T, H, hd], halves rotated by position · theta^(−2i/hd)."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)[None]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class WrittenOut:
    """A Llama-like decoder from the tensors of a checkpoint: integer linears, packed KV pages."""

    def __init__(self, folder: Path) -> None:
        self.checkpoint = ResQCheckpoint(folder)
        self.config: Any = self.checkpoint.hf_config

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        get, specs = self.checkpoint.tensor, self.checkpoint.specs
        bias = get(f"{name}.bias") if f"{name}.bias" in specs else None
        if name not in self.checkpoint.linears:
            return F.linear(x, get(f"{name}.weight"), bias)
        q = self.checkpoint.linear(name)
        return reference.linear(x, q.low, q.high, q.low_scale, q.high_scale, q.plan, bias)

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int) -> torch.Tensor:
        tokens, kind = len(q), self.checkpoint.metadata.kv_cache[layer]
        scale = 16**-0.5
        if kind.low_bits == 16:
            queries, keys, values = (
                t.transpose(0, 1) for t in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
            )
            position = torch.arange(tokens)
            gap = position[:, None] - position[None]
            mask = (gap >= 0) & ((gap < window) | (window < 0))
            return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale).transpose(0, 1)
        layout, rotation = KVLayout(16, kind.high, kind.low_bits), self.checkpoint.key_rotation(layer)
        cache = torch.zeros(2, 2, 16, layout.bytes_per_token, dtype=torch.uint8)
        reference.kv_write(k, v, cache, torch.arange(tokens), rotation, layout)
        table, start = torch.tensor([[0, 1]], dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32)
        lengths = torch.tensor([tokens], dtype=torch.int32)
        return reference.attention(q, cache, table, lengths, start, rotation, scale, layout, window)

    def logits(self, ids: torch.Tensor, windows: list[int]) -> torch.Tensor:
        get, epsilon = self.checkpoint.tensor, self.config.rms_norm_eps
        x = get("model.embed_tokens.weight")[ids]
        for layer in range(3):
            at = f"model.layers.{layer}"
            normed = rms_norm(x, get(f"{at}.input_layernorm.weight"), epsilon)
            q, k, v = (self.linear(f"{at}.self_attn.{n}_proj", normed).view(len(x), -1, 16) for n in ("q", "k", "v"))
            if f"{at}.self_attn.q_norm.weight" in self.checkpoint.specs:
                q, k = (rms_norm(t, get(f"{at}.self_attn.{n}_norm.weight"), epsilon) for n, t in (("q", q), ("k", k)))
            attended = self.attention(layer, rope(q, 10000.0), rope(k, 10000.0), v, windows[layer])
            x = x + self.linear(f"{at}.self_attn.o_proj", attended.flatten(1))
            normed = rms_norm(x, get(f"{at}.post_attention_layernorm.weight"), epsilon)
            gate, up = (self.linear(f"{at}.mlp.{n}_proj", normed) for n in ("gate", "up"))
            x = x + self.linear(f"{at}.mlp.down_proj", F.silu(gate) * up)
        return self.linear("lm_head", rms_norm(x, get("model.norm.weight"), epsilon))


@pytest.mark.parametrize(
    ("family", "windows", "metadata"),
    [
        ("llama", [-1, -1, -1], METADATA),
        ("llama", [-1, -1, -1], EIGHT_BIT_HEAD),
        ("llama-bias", [-1, -1, -1], METADATA),
        ("qwen2", [-1, -1, -1], METADATA),
        ("qwen2-window", [-1, 5, 5], METADATA),
        ("qwen3", [-1, -1, -1], METADATA),
        ("qwen3-bias", [-1, -1, -1], METADATA),
        ("mistral-window", [5, 5, 5], METADATA),
    ],
)
def test_logits_equal_the_specification(
    family: str, windows: list[int], metadata: QuantizationMetadata, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "out", family, metadata=metadata)
    model = load_reference_model(tmp_path / "out")
    with torch.no_grad():
        found = model(input_ids=IDS).logits[0]
    expected = WrittenOut(tmp_path / "out").logits(IDS[0], windows)
    # A value on the edge between two codes may fall on either side: float sums differ in order.
    close = torch.isclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.std()))
    assert close.float().mean() > 0.98
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_quantization_is_felt(tmp_path: Path) -> None:
    plain = write_checkpoint(tmp_path / "out", "qwen2")
    model = load_reference_model(tmp_path / "out")
    with torch.no_grad():
        found, exact = model(input_ids=IDS).logits, plain(input_ids=IDS).logits
    assert 0.02 < float((found - exact).norm() / exact.norm()) < 1.5


def test_generation_with_the_models_own_cache_equals_full_passes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", "llama-bias")
    model = load_reference_model(tmp_path / "out")
    prompt = IDS[:, :8]
    made = model.generate(prompt, max_new_tokens=6, do_sample=False)
    expected = prompt
    with torch.no_grad():
        for _ in range(6):
            expected = torch.cat((expected, model(input_ids=expected).logits[:, -1:].argmax(-1)), dim=1)
    assert made.tolist() == expected.tolist()


def test_bfloat16_residual_stream(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out")
    model = load_reference_model(tmp_path / "out", torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=IDS).logits
    assert logits.dtype == torch.bfloat16
    assert bool(torch.isfinite(logits).all())


def test_plain_folder_is_the_plain_model(tmp_path: Path) -> None:
    plain = save_tiny("qwen2", tmp_path)
    with torch.no_grad():
        assert torch.equal(load_reference_model(tmp_path)(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_folder_without_weights(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ResQError, match="transformers cannot load"):
        load_reference_model(tmp_path)
