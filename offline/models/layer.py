"""One decoder layer with its weights: run it, look at the inputs of its linears, replace its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call

from offline.models.adapter import SITE_LINEARS, LinearName, ModelAdapter
from offline.models.attention import AttentionHook, set_attention_hook
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName

Observed = Literal["qkv", "o", "gate_up", "down", "key", "value"]
Observer = Callable[[torch.Tensor], None]
Transform = Callable[[torch.Tensor], torch.Tensor]


# Tokens at a time through a layer where batches do not matter, if sequences are that short: what passes between the
# linears of an MLP would otherwise take more room than its weights and second moments.
PIECE_TOKENS = 1024


def pieces(hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Whole sequences of a batch [B, T, d], few at a time."""
    return hidden.split(max(1, PIECE_TOKENS // hidden.shape[1]))


class _InputReachedError(Exception):
    """Ends a forward pass once its purpose, the input of one linear, has been reached."""


class LoadedLayer:
    """A decoder layer in memory.

    ``transforms``: per site, a function that the site's input goes through before its linears, as at run time (the
    online Hadamard of "down", a fake quantizer). ``attention_hook``: the same for (q, k, v) after RoPE. Both may be
    set at any time and stay.

    Observers: "qkv", "o", "gate_up", "down" get the site's input [B, T, K] after its transform; "key" [B, kv, T, hd]
    after RoPE and "value" [B, kv, T, hd] (v_proj with bias), both before ``attention_hook``.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        index: int,
        module: nn.Module,
        positions: Callable[[torch.Tensor], Mapping[str, Any]],
    ) -> None:
        """``module``: the transformers layer, weights in place; ``positions``: its other arguments."""
        self.index = index
        self.transforms: MutableMapping[SiteName, Transform] = {}
        self.attention_hook: AttentionHook | None = None
        self._adapter = adapter
        self._module = module
        self._positions = positions

    def linear(self, name: LinearName) -> nn.Linear:
        """The linear module itself."""
        module = self._module.get_submodule(self._adapter.linear_paths[name])
        if not isinstance(module, nn.Linear):
            raise TypeError(f"{self._adapter.linear_paths[name]} is a {type(module).__name__}, not a Linear")
        return module

    def weight(self, name: LinearName) -> torch.Tensor:
        """Weight [out, in] now in use."""
        return self.linear(name).weight.data

    def set_weight(self, name: LinearName, value: torch.Tensor) -> None:
        """Overwrite a linear's weight in place (cast to the layer's dtype); ResQError when the shape differs."""
        target = self.weight(name)
        if value.shape != target.shape:
            raise ResQError(
                f"{self._adapter.linear(self.index, name)}: a weight of shape {list(value.shape)} cannot replace "
                f"{list(target.shape)}; give the dequantized weight in x-column order"
            )
        target.copy_(value)

    @torch.no_grad()
    def forward(self, hidden: torch.Tensor, observers: Mapping[Observed, Observer] | None = None) -> torch.Tensor:
        """Output [B, T, d] for hidden states [B, T, d] of sequences that all start at position 0."""
        with self._hooked(observers or {}):
            output = self._module(hidden, **self._positions(hidden))
        return output[0] if isinstance(output, tuple) else output

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor now in use, by its full name; not copies."""
        prefix = self._adapter.layer_prefix(self.index)
        return {prefix + name: value.data for name, value in self._module.named_parameters()}

    def differentiable(self, hidden: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """As :meth:`forward`, but gradients flow through ``hidden``, transforms, hook and ``tensors``.

        ``tensors`` (full names, all of the layer's) stand in for the layer's own in this call alone.
        """
        prefix = self._adapter.layer_prefix(self.index)
        parameters = {name.removeprefix(prefix): value for name, value in tensors.items()}
        with self._hooked({}):
            output = functional_call(self._module, parameters, (hidden,), dict(self._positions(hidden)), strict=True)
        return output[0] if isinstance(output, tuple) else output

    def install(self, module: nn.Module) -> None:
        """Give another module of the same kind this layer's transforms and attention hook, for good.

        ``module`` must be of a model whose attention is :data:`offline.models.attention.ATTENTION_NAME`.
        """
        for site, names in SITE_LINEARS.items():
            transform = self.transforms.get(site)
            if transform is not None:
                hook = _input_hook(transform, None)
                for name in names:
                    module.get_submodule(self._adapter.linear_paths[name]).register_forward_pre_hook(hook)
        if self.attention_hook is not None:
            set_attention_hook(module.get_submodule(self._adapter.attention_path), self.attention_hook)

    def run(self, hiddens: list[torch.Tensor], observers: Mapping[Observed, Observer] | None = None) -> None:
        """Replace each batch of hidden states by the layer's output; ``observers`` get whole batches."""
        for position, hidden in enumerate(hiddens):
            parts = (hidden,) if observers else pieces(hidden)
            hiddens[position] = torch.cat([self.forward(part, observers) for part in parts])

    @torch.no_grad()
    def stream_inputs(self, hiddens: Sequence[torch.Tensor], site: SiteName, callback: Observer) -> None:
        """Call ``callback`` with the input [B·T, K] of one site for every batch; computes no further than that."""

        def observe(x: torch.Tensor) -> None:
            callback(x.reshape(-1, x.shape[-1]))
            raise _InputReachedError

        with self._hooked({site: observe}):
            for hidden in hiddens:
                try:
                    self._module(hidden, **self._positions(hidden))
                except _InputReachedError:
                    continue

    @contextmanager
    def _hooked(self, observers: Mapping[Observed, Observer]) -> Iterator[None]:
        with ExitStack() as stack:
            for site, names in SITE_LINEARS.items():
                transform, observer = self.transforms.get(site), observers.get(site)
                if transform is None and observer is None:
                    continue
                hook = _input_hook(transform, observer)
                for name in names:
                    handle = self.linear(name).register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
            attention = self._module.get_submodule(self._adapter.attention_path)
            set_attention_hook(attention, self._attention(observers.get("key"), observers.get("value")))
            stack.callback(set_attention_hook, attention, None)
            yield

    def _attention(self, key_observer: Observer | None, value_observer: Observer | None) -> AttentionHook:
        def hook(
            query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            if key_observer is not None:
                key_observer(key)
            if value_observer is not None:
                value_observer(value)
            return (query, key, value) if self.attention_hook is None else self.attention_hook(query, key, value)

        return hook


def _input_hook(transform: Transform | None, observer: Observer | None) -> Callable[[nn.Module, tuple[Any, ...]], Any]:
    """A pre-hook shared by a site's linears: they read one tensor, so it is transformed and observed once."""
    last: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor]:
        if not last or last[0] is not args[0]:
            x = args[0] if transform is None else transform(args[0])
            last[:] = [args[0], x]
            if observer is not None:
                observer(x)
        return (last[1],)

    return hook
