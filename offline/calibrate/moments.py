"""Second moments XᵀX of activations: uncentred, accumulated in float64, one running sum a site."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from offline.calibrate.storage import load_tensors, save_tensors
from offline.models.adapter import ModelAdapter
from resq_vllm.errors import ResQError

KIND = "resq-moments-2"


class SecondMoments:
    """Σ xᵀx over tokens, for one site or for several heads at once.

    ``sum``: float64 [d, d], or [heads, d, d]; ``tokens``: rows summed per matrix.
    """

    def __init__(self, dim: int, heads: int | None = None, device: str | torch.device = "cpu") -> None:
        shape = (dim, dim) if heads is None else (heads, dim, dim)
        self.sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = 0

    def update(self, x: torch.Tensor) -> None:
        """Add rows: x [..., d], or [heads, n, d] for a sum per head. Products are formed in float64.

        Raises ResQError when the shape does not fit or the new sum is not finite.
        """
        dim = self.sum.shape[-1]
        per_head = self.sum.dim() == 3
        if x.shape[-1] != dim or (per_head and (x.dim() != 3 or x.shape[0] != self.sum.shape[0])):
            raise ResQError(f"activations of shape {list(x.shape)} do not fit second moments {list(self.sum.shape)}")
        rows = (x if per_head else x.reshape(-1, dim)).to(self.sum.device, torch.float64)
        if per_head:
            self.sum.baddbmm_(rows.transpose(1, 2), rows)
        else:
            self.sum.addmm_(rows.T, rows)
        self.tokens += rows.shape[-2]

    def merge(self, other: SecondMoments) -> None:
        """Add another sum of the same shape."""
        if self.sum.shape != other.sum.shape:
            raise ResQError(f"second moments {list(other.sum.shape)} cannot be added to {list(self.sum.shape)}")
        self.sum += other.sum.to(self.sum.device)
        self.tokens += other.tokens

    @property
    def mean(self) -> torch.Tensor:
        """E[xᵀx], symmetric to the bit, same shape as ``sum``; ResQError before the first update."""
        if not self.tokens:
            raise ResQError("second moments without a single token; run the calibration")
        return (self.sum + self.sum.mT) / (2 * self.tokens)

    def save(self, path: Path) -> None:
        """Write ``sum`` and ``tokens`` as safetensors."""
        save_tensors(path, {"sum": self.sum.cpu()}, {"kind": KIND, "tokens": str(self.tokens)})

    @classmethod
    def load(cls, path: Path) -> SecondMoments:
        """Read what ``save`` wrote; raises ResQError when the file is missing, truncated or something else."""
        tensors, metadata = load_tensors(path, KIND)
        moments = cls(1)
        try:
            moments.sum, moments.tokens = tensors["sum"], int(metadata["tokens"])
        except (KeyError, ValueError) as error:
            raise ResQError(f"{path}: lacks {error}; delete it and calibrate again") from error
        return moments


@dataclass
class ModelMoments:
    """All second moments of a model, up to layer ``layers_done``.

    ``residual`` [d, d]: inputs of q/k/v and gate/up of all layers (norm weights folded out), one sum.
    ``value`` per layer [kv, hd, hd]: v_proj outputs with bias. ``key`` per layer [hd, hd]: keys after RoPE, summed over
    kv heads. ``down`` [L, f]: Σ x_j² of down_proj's inputs, channel by channel. ``fingerprint`` ties them to a model
    and its calibration tokens.
    """

    residual: SecondMoments
    value: list[SecondMoments]
    key: list[SecondMoments]
    down: torch.Tensor
    layers_done: int
    fingerprint: str

    @classmethod
    def empty(cls, adapter: ModelAdapter, fingerprint: str, device: str | torch.device = "cpu") -> ModelMoments:
        """Zero sums for every layer of a model."""
        layers = range(adapter.num_layers)
        return cls(
            residual=SecondMoments(adapter.hidden_size, device=device),
            value=[SecondMoments(adapter.head_dim, adapter.num_kv_heads, device) for _ in layers],
            key=[SecondMoments(adapter.head_dim, device=device) for _ in layers],
            down=torch.zeros(adapter.num_layers, adapter.intermediate_size, dtype=torch.float64, device=device),
            layers_done=0,
            fingerprint=fingerprint,
        )

    def save(self, path: Path) -> None:
        """Write everything to one safetensors file (float64), whole or not at all."""
        tensors = {"residual": self.residual.sum.cpu(), "down": self.down.cpu()}
        tokens = {"tokens.residual": str(self.residual.tokens)}
        for name, moments in (("value", self.value), ("key", self.key)):
            tensors[name] = torch.stack([m.sum for m in moments]).cpu()
            tokens[f"tokens.{name}"] = ",".join(str(m.tokens) for m in moments)
        metadata = {"kind": KIND, "layers_done": str(self.layers_done), "fingerprint": self.fingerprint}
        save_tensors(path, tensors, metadata | tokens)

    @classmethod
    def load(cls, path: Path, fingerprint: str | None = None, device: str | torch.device = "cpu") -> ModelMoments:
        """Read what ``save`` wrote.

        Raises ResQError when the file is missing or truncated, or ``fingerprint`` is given and is not the file's.
        """
        tensors, metadata = load_tensors(path, KIND)
        try:
            counts = {n: [int(t) for t in metadata[f"tokens.{n}"].split(",")] for n in ("residual", "value", "key")}
            sums = {"residual": tensors["residual"][None], "value": tensors["value"], "key": tensors["key"]}
            layers_done, found, down = int(metadata["layers_done"]), metadata["fingerprint"], tensors["down"]
        except (KeyError, ValueError) as error:
            raise ResQError(f"{path}: lacks {error}; delete it and calibrate again") from error
        if fingerprint is not None and found != fingerprint:
            raise ResQError(
                f"{path}: was collected from another model or other calibration text; delete it to calibrate afresh"
            )
        loaded: dict[str, list[SecondMoments]] = {}
        for name, stacked in sums.items():
            loaded[name] = []
            for matrix, tokens in zip(stacked, counts[name], strict=True):
                moments = SecondMoments(1)
                moments.sum, moments.tokens = matrix.to(device, copy=True), tokens
                loaded[name].append(moments)
        return cls(
            loaded["residual"][0], loaded["value"], loaded["key"], down.to(device, copy=True), layers_done, found
        )
