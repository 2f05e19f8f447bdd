"""A stack of decoder layers as one op of vLLM's CPU graphs: attention by attention, with what lies between.

``resq::decoder`` asks vLLM for the batch once and hands it to the layers' :class:`DecoderStack`. Where they do not
share one batch of the packed cache (profiling, no cache yet, a 16-bit cache or a batch of their own in some layers, a
KV connector), it calls vLLM's attention layer by layer, as the graph did before.
:mod:`resq_vllm.fusion_decoder` puts the op into the graph.
"""

# No "from __future__ import annotations": torch reads the ops' schemas from the types below.
import logging
from collections.abc import Sequence
from typing import Any

import torch

from resq_vllm import fused_linear, ops, vllm_api
from resq_vllm.attention import ResQAttentionImpl, ResQMetadata
from resq_vllm.decoder_stack import DecoderStack
from resq_vllm.log import log_once
from resq_vllm.vllm_api import LayerNameType

# Tensors of a layer in `weights`, as fused_linear.between_attentions takes them; the last layer may end with its MLP.
LAYER_TENSORS, MLP_TENSORS = 26, 19
# Names that one layer_ids takes: an op has so many arguments and no more.
NAMES_AT_ONCE = 8

_library = torch.library.Library("resq", "FRAGMENT")
_ids: dict[str, int] = {}
_names: list[str] = []


def layer_ids(
    a: LayerNameType,
    b: LayerNameType,
    c: LayerNameType,
    d: LayerNameType,
    e: LayerNameType,
    f: LayerNameType,
    g: LayerNameType,
    h: LayerNameType,
) -> torch.Tensor:
    """Numbers for names of attention layers, int64 [8]: a graph passes names to ops one by one, tensors in lists."""
    return torch.tensor([_id(name) for name in (a, b, c, d, e, f, g, h)])


def _id(name: LayerNameType) -> int:
    text = name if isinstance(name, str) else name.value
    known = _ids.get(text)
    if known is None:
        known = _ids[text] = len(_names)
        _names.append(text)
    return known


def _layer_ids_fake(*names: LayerNameType) -> torch.Tensor:
    return torch.empty(NAMES_AT_ONCE, dtype=torch.int64)


def decoder(
    qkv: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    epsilons: Sequence[float],
    query_heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """L decoder layers from the first one's q, k, v to the end of the last one.

    Args:
        qkv: [T, (H + 2·Hkv)·hd], before RoPE.
        residual: [T, hidden], the residual stream at the first layer's attention.
        positions: int64 [T].
        cos_sin_cache: [positions, hd], cosines of half a head and then sines.
        ids: what :func:`layer_ids` gave for the layers' attention; entries after the L-th count for nothing.
        weights: the tensors of :func:`resq_vllm.fused_linear.between_attentions`, layer by layer; the last layer may
            have those of :func:`resq_vllm.fused_linear.decoder_mlp`.
        epsilons: of the norms, in the same order.
        query_heads: H.
        kv_heads: Hkv.

    Returns:
        The last layer's results: y and the residual stream.

    """
    layers = -(-len(weights) // LAYER_TENSORS)
    names = [_names[i] for part in ids for i in part.tolist()][:layers]
    contexts = [vllm_api.get_attention_context(name) for name in names]
    batch = contexts[0][0]
    if not isinstance(batch, ResQMetadata) or vllm_api.has_kv_transfer_group() or not _packed(contexts, batch):
        if batch is not None:
            log_once(
                logging.INFO,
                "ResQ: attention is called layer by layer, since the layers do not share one batch of the packed cache",
            )
        return layer_by_layer(qkv, residual, positions, cos_sin_cache, names, weights, epsilons, query_heads, kv_heads)
    caches = [c[2] for c in contexts]
    rotations = [c[1].key_rotation for c in contexts]
    # Kept by the first layer, so that weights and caches are let go with the model.
    first = contexts[0][1].impl
    stack = first.stack
    if stack is None or not stack.has(cos_sin_cache, weights, caches, rotations):
        impls = [c[1].impl for c in contexts]
        for impl, cache in zip(impls, caches, strict=True):
            impl.prepare(cache)
        layouts = [n for i in impls for n in (i.layout.high, i.layout.low_bits, i.sliding_window)]
        tensors = cos_sin_cache, weights, caches, rotations
        first.stack = stack = DecoderStack(*tensors, epsilons, [i.scale for i in impls], layouts, query_heads)
    tables = batch.block_table, batch.seq_lens, batch.query_start_loc
    return stack(qkv, residual, positions, batch.slot_mapping, *tables)


def _packed(contexts: Sequence[tuple[Any, ...]], batch: ResQMetadata) -> bool:
    return all(c[0] is batch and isinstance(c[1].impl, ResQAttentionImpl) for c in contexts)


def layer_by_layer(
    qkv: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    names: Sequence[str],
    weights: Sequence[torch.Tensor | None],
    epsilons: Sequence[float],
    query_heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with vLLM's op for the attention of every layer, whatever its backend."""
    head_dim = cos_sin_cache.shape[1]
    x = qkv.clone()
    for i, name in enumerate(names):
        ops.rope(x, positions, cos_sin_cache, query_heads + kv_heads)
        heads = x.unflatten(1, (-1, head_dim))
        query, key, value = heads.split([query_heads, kv_heads, kv_heads], dim=1)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        vllm_api.unified_attention_with_output(query, key, value, out, name)
        of_layer = weights[LAYER_TENSORS * i : LAYER_TENSORS * (i + 1)]
        o, norm, rest = of_layer[:6], of_layer[6], of_layer[7:]
        arguments = [out.flatten(1), residual, *o, norm, epsilons[2 * i], *rest[:12]]
        if len(of_layer) == MLP_TENSORS:
            return torch.ops.resq.decoder_mlp.default(*arguments)
        following = rest[12], epsilons[2 * i + 1], *rest[13:]
        x, residual = torch.ops.resq.between_attentions.default(*arguments, *following)
    return x, residual


def _decoder_fake(
    qkv: torch.Tensor,
    residual: torch.Tensor,
    positions: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    ids: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor | None],
    *rest: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    return fused_linear.decoder_fake(residual, residual, *weights)


for _name, _function, _fake in (("layer_ids", layer_ids, _layer_ids_fake), ("decoder", decoder, _decoder_fake)):
    _library.define(_name + torch.library.infer_schema(_function, mutates_args=()))
    _library.impl(_name, _function, "CPU" if _name == "decoder" else "CompositeExplicitAutograd")
    torch.library.register_fake(f"resq::{_name}", _fake)
