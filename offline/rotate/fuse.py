"""Fusion of norms and rotations into the weights, in float64 (method: arXiv 2412.14363 section 4.2; QuaRot for H).

Row vectors, y = x·Wᵀ, W [out, in]. Every function takes tensors by full checkpoint name and returns new ones; nothing
is changed in place. o_proj keeps its head-major columns (each head [low | high]).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from offline.bases.bases import LayerRotation
from offline.models.adapter import LinearName, ModelAdapter, NormName
from resq_vllm.errors import ResQError
from resq_vllm.hadamard import hadamard_matrix, hadamard_order, sylvester

NORM_READERS: dict[NormName, tuple[LinearName, ...]] = {"input": ("q", "k", "v"), "post": ("gate", "up")}
# Rows of an embedding rotated at a time: float64 copies of a 150k-row table would not fit beside it.
ROW_CHUNK = 1024


def fold_norms(
    tensors: Mapping[str, torch.Tensor], adapter: ModelAdapter, layer: int, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    """One layer with its RMSNorm weights moved into q, k, v and gate, up: W ← W·diag(γ), γ ← 1.

    The folded weights are products in float64, in ``dtype``, the other tensors as given.
    """
    result = dict(tensors)
    for norm, readers in NORM_READERS.items():
        gamma = result[adapter.norm(layer, norm)]
        for name in readers:
            key = adapter.linear(layer, name) + ".weight"
            result[key] = (result[key].double() * gamma.double()).to(dtype)
        result[adapter.norm(layer, norm)] = torch.ones_like(gamma)
    return result


def fuse_layer(
    tensors: Mapping[str, torch.Tensor],
    adapter: ModelAdapter,
    layer: int,
    rotation: LayerRotation,
    hadamard_groups: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """One decoder layer, norms folded and rotated: the same names and shapes, all in ``dtype``.

    q, k, v, gate, up: W·U_A. v: U_B[t]ᵀ·W_v[t] and b_v[t]·U_B[t] per kv head t; o_proj's columns of query head j:
    W_o[:, j]·U_B[⌊j/g⌋]. o and down: U_Aᵀ·W, and output biases b·U_A. down: W·H_Dᵀ with
    H_D = I_G ⊗ (H_k ⊗ H_{2^m})/√n, G = ``hadamard_groups``; 0 leaves H_D out. Computed in float64 on the device of
    ``rotation.residual``, returned on the device of the input. U_C is left to run time.

    Raises ResQError when ``rotation`` has other sizes than the model, or G does not cut the FFN width.
    """
    _check(adapter, rotation)
    device, fused = rotation.residual.device, dict(tensors)
    gamma = {name: tensors[adapter.norm(layer, norm)] for norm, names in NORM_READERS.items() for name in names}
    # One linear in float64 at a time: all of them would be four times the layer in float32.
    for name in adapter.linear_paths:
        module = adapter.linear(layer, name)
        weight = tensors[f"{module}.weight"].to(device, torch.float64)
        if name in gamma:
            weight = weight * gamma[name].to(device, torch.float64)
        weight = rotate_rows(weight, hadamard_groups) if name == "down" else weight
        fused[f"{module}.weight"] = rotate_weight(name, weight, adapter, rotation).to(dtype)
        if f"{module}.bias" in tensors:
            bias = tensors[f"{module}.bias"].to(device, torch.float64)
            fused[f"{module}.bias"] = rotate_bias(name, bias, adapter, rotation).to(dtype)
    for norm in NORM_READERS:
        fused[adapter.norm(layer, norm)] = torch.ones_like(tensors[adapter.norm(layer, norm)])
    return {name: value.to(tensors[name].device, dtype) for name, value in fused.items()}


def rotate_layer(
    folded: Mapping[str, torch.Tensor], adapter: ModelAdapter, layer: int, rotation: LayerRotation
) -> dict[str, torch.Tensor]:
    """The part of :func:`fuse_layer` that depends on U_A and U_B, in the one dtype of weights and rotation.

    ``folded``: the layer's tensors with norms folded and H_D in down's columns. Differentiable in U_A and U_B; sizes
    are not checked. U_C is not read.
    """
    work = dict(folded)
    for name in adapter.linear_paths:
        module = adapter.linear(layer, name)
        work[f"{module}.weight"] = rotate_weight(name, work[f"{module}.weight"], adapter, rotation)
        if f"{module}.bias" in work:
            work[f"{module}.bias"] = rotate_bias(name, work[f"{module}.bias"], adapter, rotation)
    return work


def rotate_weight(
    name: LinearName, weight: torch.Tensor, adapter: ModelAdapter, rotation: LayerRotation
) -> torch.Tensor:
    """One linear's weight [out, in], as :func:`rotate_layer`."""
    basis, heads = rotation.residual, rotation.value
    kv, hd, group = adapter.num_kv_heads, adapter.head_dim, adapter.heads_per_kv
    if name == "o":
        columns = weight.view(-1, kv, group, hd)
        return basis.T @ torch.einsum("nkgi,kij->nkgj", columns, heads).flatten(1)
    if name == "down":
        return basis.T @ weight
    weight = weight @ basis
    return (heads.mT @ weight.view(kv, hd, -1)).flatten(0, 1) if name == "v" else weight


def rotate_bias(name: LinearName, bias: torch.Tensor, adapter: ModelAdapter, rotation: LayerRotation) -> torch.Tensor:
    """One linear's bias [out], as :func:`rotate_layer`."""
    if name == "v":
        return (bias.view(adapter.num_kv_heads, 1, adapter.head_dim) @ rotation.value).flatten()
    return bias @ rotation.residual if name in ("o", "down") else bias


def rotate_rows(x: torch.Tensor, groups: int) -> torch.Tensor:
    """x·H_Dᵀ along the last dimension f of x [..., f], in x's dtype; ``groups`` = 0 returns x.

    Each of the ``groups`` blocks, seen as [k, 2^m] row-major, becomes H_k·block·H_{2^m}/√(k·2^m). This is also what the
    input of down_proj goes through at run time. Raises ResQError when the width does not
    divide or has no Hadamard order.
    """
    if groups == 0:
        return x
    width = x.shape[-1]
    if width % groups:
        raise ResQError(f"{groups} Hadamard blocks do not divide {width} columns; choose a divisor")
    n = width // groups
    k = hadamard_order(n)
    left = hadamard_matrix(k).to(x.device, x.dtype)
    right = sylvester(n // k).to(x.device, x.dtype)
    blocks = x.reshape(*x.shape[:-1], groups, k, n // k)
    return ((left @ blocks @ right) / n**0.5).reshape(x.shape)


def fuse_embedding(table: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """E·U_A for the token embedding [vocab, d]; returns [vocab, d] in ``dtype``."""
    return _rotate_table(table, residual, dtype)


def fuse_lm_head(
    table: torch.Tensor, final_norm: torch.Tensor, residual: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """W·diag(γ_final)·U_A for lm_head [vocab, d] (of a tied model: the embedding as it was); returns ``dtype``.

    The final norm's weight becomes ones with this.
    """
    gamma = final_norm.to(residual.device, torch.float64)
    return _rotate_table(table, gamma[:, None] * residual, dtype)


def _rotate_table(table: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if table.shape[-1] != matrix.shape[0]:
        raise ResQError(f"a basis of {matrix.shape[0]} dimensions does not fit an embedding of {table.shape[-1]}")
    result = torch.empty(table.shape, dtype=dtype, device=table.device)
    for start in range(0, table.shape[0], ROW_CHUNK):
        rows = table[start : start + ROW_CHUNK].to(matrix.device, torch.float64)
        result[start : start + ROW_CHUNK] = (rows @ matrix).to(table.device, dtype)
    return result


def _check(adapter: ModelAdapter, rotation: LayerRotation) -> None:
    d, kv, hd = adapter.hidden_size, adapter.num_kv_heads, adapter.head_dim
    wanted = {"residual": (d, d), "value": (kv, hd, hd), "key": (hd, hd)}
    for name, shape in wanted.items():
        found: torch.Tensor = getattr(rotation, name)
        if tuple(found.shape) != shape:
            raise ResQError(
                f"the {name} basis has shape {list(found.shape)}, but the model needs {list(shape)}; "
                "make the basis from this model"
            )
        if found.dtype != torch.float64:
            raise ResQError(f"the {name} basis is {found.dtype}; rotations are fused in float64")
