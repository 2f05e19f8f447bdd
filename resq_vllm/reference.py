"""Every op of ResQ in plain torch: the executable specification that CPU and CUDA kernels are tested against.

Slow and obvious on purpose. Integer parts are exact (int32 sums fit: |I| <= 255·127·K, 4.6e8 at K = 14336), float
parts are float32 in the order that the kernels use. Symbols: M tokens, K input columns, N outputs, G activation
groups, R runs (see resq_vllm.formats.plan), T tokens, H heads, hd head_dim.
"""

from __future__ import annotations

import torch

from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.plan import LinearPlan
from resq_vllm.hadamard import hadamard_matrix, hadamard_order

FLOAT16_MAX = 65504.0


# --- activations ------------------------------------------------------------------------------------------------------
def asymmetric_scale(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point over the last dim, whose range is widened to include 0 (method: s = (max−min)/(2^b−1)).

    x: float32 [..., K]. Returns scale float32 [..., 1] (1 where x is all zero) and zero point int32 [..., 1].
    """
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    # A tensor divisor: torch turns division by a Python number into a multiplication, which rounds differently.
    scale = torch.div(high - low, torch.full_like(low, 2**bits - 1))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).to(torch.int32)


def quantize_asymmetric(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """q = clamp(round_half_even(x/s) + z, 0, 2^b−1) as uint8, same shape as x."""
    return (torch.round(x / scale) + zero).clamp(0, 2**bits - 1).to(torch.uint8)


def block_hadamard(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Each of ``groups`` equal blocks of the last dim times (H_k ⊗ H_{2^m})/sqrt(n), in x's dtype (paper §3, U_D).

    x: [..., groups·n]. The Kronecker product acts on a block as a [k, 2^m] matrix: H_k on its rows, H_{2^m} on its
    columns.
    """
    n = x.shape[-1] // groups
    k = hadamard_order(n)
    y = x.reshape(*x.shape[:-1], groups, k, n // k)
    step = 1
    while step < n // k:
        pairs = y.reshape(*y.shape[:-1], -1, 2, step)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack((first + second, first - second), dim=-2).reshape(y.shape)
        step *= 2
    if k > 1:
        y = torch.einsum("ij,...jm->...im", hadamard_matrix(k).to(y), y)
    return y.reshape(x.shape) / n**0.5


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x + residual (or of x); the sum, the normed row and its product with the weight are rounded in turn.

    x, residual [M, K] and weight [K] of one dtype. Returns the normed row and the sum, both of that dtype.
    """
    total = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    row = total.float()
    normed = (row * torch.rsqrt(row.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
    return normed * weight, total


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm as the CPU's fused ops compute it: of the float32 sum x + residual, not of what it is rounded to.

    So vLLM's graph has it. The mean runs over 16 interleaved sums, which are added in halves. Shapes as in
    :func:`rms_norm`; returns the normed row and the rounded sum.
    """
    total = x.float() if residual is None else x.float() + residual.float()
    squares = torch.nn.functional.pad(total.square(), (0, -total.shape[-1] % 16)).unflatten(-1, (-1, 16))
    lanes = torch.zeros_like(squares[..., 0, :])
    for step in range(squares.shape[-2]):
        lanes = lanes + squares[..., step, :]
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    # Not 1 / torch.sqrt: MKL's square root is off by a bit on some CPUs (AMD Zen 4).
    factor = torch.rsqrt(lanes / total.shape[-1] + epsilon)
    return (total * factor).to(x.dtype) * weight, total.to(x.dtype)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """SiLU(gate)·up of gate_up [..., 2K] = [gate | up], both results rounded to its dtype."""
    gate, up = gate_up.chunk(2, dim=-1)
    row = gate.float()
    return torch.div(row, 1 + torch.exp(-row)).to(gate.dtype) * up


def rope(x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, heads: int) -> torch.Tensor:
    """Rotary embedding of the first ``heads`` heads of every row of x [T, ...], halves of a head turning together.

    positions int64 [T]; cos_sin_cache [positions, hd] of x's dtype, cosines then sines. Products of 16-bit values are
    exact in float32, so only the sum and the result are rounded.
    """
    width = heads * cos_sin_cache.shape[1]
    cos, sin = cos_sin_cache[positions].float()[:, None].chunk(2, dim=-1)
    first, second = x[:, :width].unflatten(1, (heads, -1)).float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(1)
    return torch.cat((turned.to(x.dtype), x[:, width:]), dim=-1)


def quantize_activation(x: torch.Tensor, plan: LinearPlan) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Online Hadamard, then per-token quantization by activation group.

    x: [M, K]. Returns codes uint8 [M, K] in x's column order, scale float32 [M, G], zero point int32 [M, G].
    """
    x = x.float()
    if plan.hadamard_groups:
        x = block_hadamard(x, plan.hadamard_groups)
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for group, bits in enumerate(plan.group_bits):
        columns = _group_columns(plan, group)
        scale, zero = asymmetric_scale(x[:, columns], bits)
        codes[:, columns] = quantize_asymmetric(x[:, columns], scale, zero, bits)
        scales.append(scale)
        zeros.append(zero)
    return codes, torch.cat(scales, 1), torch.cat(zeros, 1)


def fake_quantize_activation(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """x̂ = s(q−z) in float32 and x's column order, after the online Hadamard: what the integer GEMM stands for."""
    x = x.float()
    return round_activation(block_hadamard(x, plan.hadamard_groups) if plan.hadamard_groups else x, plan)


def round_activation(x: torch.Tensor, plan: LinearPlan) -> torch.Tensor:
    """x̂ = s(q−z) by activation group, of x float32 [..., K] as it is (its online Hadamard done)."""
    shape = x.shape
    x = x.reshape(-1, shape[-1])
    out = torch.empty_like(x)
    for group, bits in enumerate(plan.group_bits):
        columns = _group_columns(plan, group)
        part = x[:, columns]
        scale, zero = asymmetric_scale(part, bits)
        out[:, columns] = ((torch.round(part / scale) + zero).clamp_(0, 2**bits - 1) - zero) * scale
    return out.reshape(shape)


def _group_columns(plan: LinearPlan, group: int) -> torch.Tensor | slice:
    index: list[int] = []
    start = 0
    for segment in plan.segments:
        if segment.group == group:
            index.extend(range(start, start + segment.columns))
        start += segment.columns
    if index[-1] - index[0] + 1 == len(index):
        return slice(index[0], index[-1] + 1)
    return torch.tensor(index)


# --- linear -----------------------------------------------------------------------------------------------------------
def linear_integer(
    codes: torch.Tensor, zero: torch.Tensor, low: torch.Tensor, high: torch.Tensor, plan: LinearPlan
) -> torch.Tensor:
    """The exact integer part I_r = Σ_k q_x·q_w − z·Σ_k q_w of every run, int32 [R, M, N].

    codes uint8 [M, K] (x's column order), zero int32 [M, G], low int8 [N, K_l], high int8 [N, K_h].
    """
    weights = (low, high)
    by_part = [codes[:, plan.part_index(part)] for part in (0, 1)]
    out = []
    for run in plan.runs:
        span = slice(run.start, run.start + run.length)
        w = weights[run.part][:, span]
        # Every product and partial sum is below 2^53, so a float64 matmul is exact (and far faster than an int one).
        acc = (by_part[run.part][:, span].double() @ w.double().T).to(torch.int64)
        out.append(acc - zero[:, run.group : run.group + 1].long() * w.long().sum(1))
    return torch.stack(out).to(torch.int32)


def weight_scale_rows(low_scale: torch.Tensor, high_scale: torch.Tensor) -> torch.Tensor:
    """Weight scales as the op takes them, float32 [scale rows, N]: low_scale [N] or [N, groups], high_scale [N]."""
    return torch.cat((low_scale.float().reshape(len(high_scale), -1).T, high_scale.float()[None]))


def linear(
    x: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    low_scale: torch.Tensor,
    high_scale: torch.Tensor,
    plan: LinearPlan,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = Σ_r float(I_r)·(s_x·s_w) + bias in float32, cast to x's dtype.

    x [M, K]; low int8 [N, K_l], high int8 [N, K_h] (codes, one value an element); low_scale float32 [N], or [N, groups]
    where the plan has weight groups; high_scale float32 [N].
    """
    codes, scale, zero = quantize_activation(x, plan)
    integer = linear_integer(codes, zero, low, high, plan)
    weight_scale = weight_scale_rows(low_scale, high_scale)
    y = torch.zeros(x.shape[0], low.shape[0], dtype=torch.float32)
    for index, run in enumerate(plan.runs):
        y = y + integer[index].float() * (scale[:, run.group : run.group + 1] * weight_scale[run.scale_row])
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def linear_bf16(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., K]·Wᵀ + bias, all bfloat16: float32 sums (in any order), rounded once; weight [N, K], bias [N]."""
    y = x.float() @ weight.float().t()
    return (y if bias is None else y + bias.float()).to(x.dtype)


# --- KV cache ---------------------------------------------------------------------------------------------------------
def _kv_parts(layout: KVLayout) -> list[tuple[slice, int]]:
    parts = [(slice(0, layout.low), layout.low_bits)]
    if layout.high:
        parts.append((slice(layout.low, layout.head_dim), 8))
    return parts


def _kv_scale(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As asymmetric_scale, but the scale is rounded to float16 first, since that is what a page can hold."""
    low = x.amin(-1, keepdim=True).clamp(max=0.0)
    high = x.amax(-1, keepdim=True).clamp(min=0.0)
    scale = torch.div(high - low, torch.full_like(low, 2**bits - 1)).clamp(max=FLOAT16_MAX).half().float()
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1).to(torch.int32)


def kv_quantize(x: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per token, head and part: asymmetric codes with a float16 scale.

    x [T, H, hd] (K already rotated by U_C). Returns codes uint8 [T, H, hd], scales float16 [T, H, parts] and zero
    points uint8 [T, H, parts].
    """
    x = x.float()
    codes = torch.empty(x.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for span, bits in _kv_parts(layout):
        scale, zero = _kv_scale(x[..., span], bits)
        codes[..., span] = quantize_asymmetric(x[..., span], scale, zero, bits)
        scales.append(scale.half())
        zeros.append(zero.to(torch.uint8))
    return codes, torch.cat(scales, -1), torch.cat(zeros, -1)


def kv_dequantize(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """x̂ = s(q−z), float32 [T, H, hd]."""
    out = torch.empty(codes.shape, dtype=torch.float32)
    for index, (span, _) in enumerate(_kv_parts(layout)):
        offset = codes[..., span].to(torch.int32) - zeros[..., index : index + 1].to(torch.int32)
        out[..., span] = offset.float() * scales[..., index : index + 1].float()
    return out


def kv_fake_quantize(x: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """What attention sees of x [..., T, H, hd] (or any leading dims) after a round trip through the cache, float32."""
    out = torch.empty(x.shape, dtype=torch.float32)
    for span, bits in _kv_parts(layout):
        part = x[..., span].float()
        scale, zero = _kv_scale(part, bits)
        out[..., span] = ((torch.round(part / scale) + zero).clamp_(0, 2**bits - 1) - zero) * scale
    return out


def _low_plane_index(layout: KVLayout, tokens: int, key: bool) -> torch.Tensor:
    """Byte offset inside a 4-bit low plane of every (token, byte of the token), int64 [N, lp/2]."""
    t = torch.arange(tokens)[:, None]
    b = torch.arange(layout.low_padded // 2)[None, :]
    if key:
        return ((t // 16) * (layout.low_padded // 8) + b // 4) * 64 + (t % 16) * 4 + b % 4
    return ((t // 4) * (layout.low_padded // 2) + b) * 4 + t % 4


def _byte_plane_index(width: int, tokens: int, key: bool) -> torch.Tensor:
    """Byte offset inside an 8-bit plane of every (token, dim), int64 [N, width]."""
    t = torch.arange(tokens)[:, None]
    d = torch.arange(width)[None, :]
    if key:
        return ((t // 16) * (width // 4) + d // 4) * 64 + (t % 16) * 4 + d % 4
    return ((t // 4) * width + d) * 4 + t % 4


def _low_bytes(codes: torch.Tensor, key: bool) -> torch.Tensor:
    """4-bit codes uint8 [N, lp] -> a token's bytes uint8 [N, lp/2] (K: dims 8g+j | 8g+4+j; V: dims c | c+lp/2)."""
    if key:
        words = codes.reshape(codes.shape[0], -1, 2, 4)
        return (words[:, :, 0] | (words[:, :, 1] << 4)).flatten(1)
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _low_codes(packed: torch.Tensor, key: bool) -> torch.Tensor:
    """The inverse of :func:`_low_bytes`."""
    first, second = packed & 0x0F, packed >> 4
    if key:
        shape = (packed.shape[0], -1, 4)
        return torch.stack((first.reshape(shape), second.reshape(shape)), dim=2).flatten(1)
    return torch.cat((first, second), dim=1)


def _pad(codes: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(codes, (0, width - codes.shape[-1]))


def _page_views(page: torch.Tensor, layout: KVLayout, tokens: int) -> dict[str, torch.Tensor]:
    """Views of one page's planes. page: uint8 [N·C], contiguous."""
    at = layout.planes(tokens)
    return {
        "key_low": page[at.key_low : at.key_high],
        "key_high": page[at.key_high : at.value_low],
        "value_low": page[at.value_low : at.value_high],
        "value_high": page[at.value_high : at.scales],
        "scales": page[at.scales : at.zeros].view(torch.float16).view(2, layout.parts, tokens),
        "zeros": page[at.zeros : at.total].view(2, layout.parts, tokens),
    }


def kv_write(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    rotation: torch.Tensor | None,
    layout: KVLayout,
) -> None:
    """Rotate k by U_C, quantize k and v, and pack them into their pages, in place.

    key, value [T, Hkv, hd]; kv_cache uint8 [blocks, Hkv, N, C] whose pages (last two dims) are contiguous;
    slot_mapping int64 [T] = block·N + offset, −1 = skip; rotation float32 [hd, hd] or None.
    """
    tokens = kv_cache.shape[2]
    k = key.float() if rotation is None else key.float() @ rotation.float()
    packed = [kv_quantize(k, layout), kv_quantize(value, layout)]
    for t, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        block, offset = divmod(slot, tokens)
        for head in range(kv_cache.shape[1]):
            planes = _page_views(kv_cache[block, head].view(-1), layout, tokens)
            for which, name in enumerate(("key", "value")):
                codes, scales, zeros = (part[t, head] for part in packed[which])
                is_key = which == 0
                low = _pad(codes[: layout.low], layout.low_padded)[None]
                if layout.low_bits == 4:
                    place = _low_plane_index(layout, tokens, is_key)[offset]
                    planes[f"{name}_low"][place] = _low_bytes(low, is_key)[0]
                else:
                    planes[f"{name}_low"][_byte_plane_index(layout.low_padded, tokens, is_key)[offset]] = low[0]
                if layout.high:
                    place = _byte_plane_index(layout.high_padded, tokens, is_key)[offset]
                    planes[f"{name}_high"][place] = _pad(codes[layout.low :], layout.high_padded)
                planes["scales"][which, :, offset] = scales
                planes["zeros"][which, :, offset] = zeros


def kv_read_page(page: torch.Tensor, layout: KVLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """All of one page. page: uint8 [N, C], contiguous. Returns K̂ (rotated) and V̂, float32 [N, hd]."""
    tokens = page.shape[0]
    planes = _page_views(page.reshape(-1), layout, tokens)
    out = []
    for which, name in enumerate(("key", "value")):
        is_key = which == 0
        if layout.low_bits == 4:
            low = _low_codes(planes[f"{name}_low"][_low_plane_index(layout, tokens, is_key)], is_key)
        else:
            low = planes[f"{name}_low"][_byte_plane_index(layout.low_padded, tokens, is_key)]
        codes = low[:, : layout.low]
        if layout.high:
            high = planes[f"{name}_high"][_byte_plane_index(layout.high_padded, tokens, is_key)]
            codes = torch.cat((codes, high[:, : layout.high]), dim=1)
        scales, zeros = planes["scales"][which].T[:, None], planes["zeros"][which].T[:, None]
        out.append(kv_dequantize(codes[:, None], scales, zeros, layout)[:, 0])
    return out[0], out[1]


def kv_read(
    kv_cache: torch.Tensor, block_table: torch.Tensor, length: int, layout: KVLayout
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first ``length`` tokens of a sequence: K̂ (rotated) and V̂, float32 [length, Hkv, hd].

    kv_cache uint8 [blocks, Hkv, N, C]; block_table int32 [>= ceil(length/N)].
    """
    blocks = block_table[: -(-length // kv_cache.shape[2])].tolist()
    keys, values = [], []
    for head in range(kv_cache.shape[1]):
        pages = [kv_read_page(kv_cache[block, head], layout) for block in blocks]
        keys.append(torch.cat([k for k, _ in pages])[:length])
        values.append(torch.cat([v for _, v in pages])[:length])
    return torch.stack(keys, dim=1), torch.stack(values, dim=1)


# --- attention --------------------------------------------------------------------------------------------------------
def attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    rotation: torch.Tensor | None,
    scale: float,
    layout: KVLayout,
    sliding_window: int = -1,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Causal attention of every query token over its sequence's packed cache (its own entry included).

    query [T, H, hd] (after RoPE, unrotated); block_table int32 [S, blocks]; seq_lens int32 [S] counts the new tokens;
    query_start_loc int32 [S+1]; sliding_window: a token sees itself and the window−1 tokens before it, −1 = all.
    Computes in ``dtype`` and returns [T, H, hd] of it; rows that no sequence covers are 0.
    """
    q = query.to(dtype) if rotation is None else query.to(dtype) @ rotation.to(dtype)
    out = torch.zeros(query.shape, dtype=dtype)
    group = query.shape[1] // kv_cache.shape[1]
    for s, length in enumerate(seq_lens.tolist()):
        first, last = int(query_start_loc[s]), int(query_start_loc[s + 1])
        if last == first:
            continue
        keys, values = kv_read(kv_cache, block_table[s], length, layout)
        keys = keys.to(dtype).repeat_interleave(group, dim=1)
        values = values.to(dtype).repeat_interleave(group, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q[first:last], keys) * scale
        position = torch.arange(length - (last - first), length)[:, None]
        past = torch.arange(length)[None, :]
        hidden = past > position
        if sliding_window >= 0:
            hidden |= past <= position - sliding_window
        probability = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[first:last] = torch.einsum("hqk,khd->qhd", probability, values)
    return out
