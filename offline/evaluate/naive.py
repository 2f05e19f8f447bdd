"""The baseline: a plain model rounded to nearest in weights, activations and KV cache; no rotation, no high part."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from offline.evaluate.fake_quant import FakeQuantCache, FakeQuantLinear, attach_cache, register_attention
from offline.evaluate.reference_model import load_plain_model, replace_module
from offline.models.adapter import SITE_LINEARS, NormName
from offline.models.registry import adapter_for
from offline.pack.expected import attention_names
from offline.pack.names import site_of
from offline.quantize.mixed import quantize_linear
from resq_vllm.formats.kv_layout import KVLayout
from resq_vllm.formats.metadata import SiteName
from resq_vllm.formats.plan import LOW, LinearPlan, Segment

_NORM_SITES: dict[NormName, SiteName] = {"input": "qkv", "post": "gate_up"}


def load_naive_model(
    directory: Path,
    bits: Literal[4, 8] = 4,
    clip: bool = True,
    dtype: torch.dtype = torch.float32,
    fold_norms: bool = False,
) -> Any:
    """RTN W4A4KV4 (or 8 bits throughout) of the plain model in ``directory``, in fake quantization.

    Weights symmetric per output channel (``clip``: with the clip search), linear inputs asymmetric per token, K (after
    RoPE) and V asymmetric per token and head: the quantizers of ResQ on the model as it is. Embedding, norms and
    lm_head stay in ``dtype``.

    ``fold_norms``: first move the RMSNorm weights into the linears behind them, as every rotation method must. The
    float model is the same, but without the rotation that follows it quantizes worse (on a 3M-parameter Llama: 29.3
    against 21.2): comparisons in the literature differ in this, so say which one a figure is.
    """
    model = load_plain_model(directory, dtype)
    if fold_norms:
        _fold_norms(model)
    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and site_of(n)]
    for name, module in linears:
        plan = LinearPlan((Segment(module.in_features, LOW, 0),), (bits,))
        quantized = quantize_linear(module.weight.detach(), None, plan, low_bits=bits, clip=clip, name=name)
        bias = None if module.bias is None else module.bias.detach()
        replace_module(model, name, FakeQuantLinear(quantized, bias))
    for name in attention_names(model):
        attention = model.get_submodule(name)
        attach_cache(attention, FakeQuantCache(KVLayout(int(attention.head_dim), 0, bits)))
    model.set_attn_implementation(register_attention())
    return model.eval()


@torch.no_grad()
def _fold_norms(model: Any) -> None:
    """W ← W·diag(γ), γ ← 1 for the norms before attention and before the MLP."""
    adapter = adapter_for(model.config)
    for layer in range(adapter.num_layers):
        for norm, site in _NORM_SITES.items():
            gamma = model.get_parameter(adapter.norm(layer, norm))
            for name in SITE_LINEARS[site]:
                model.get_submodule(adapter.linear(layer, name)).weight.mul_(gamma)
            gamma.fill_(1)
