"""Second moments of a whole model, layer by layer (method: arXiv 2412.14363 section 4.1)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from offline.calibrate.data import require_tokens
from offline.calibrate.moments import ModelMoments
from offline.models.layer import Observed, Observer
from offline.models.runner import LayerRunner, make_batches
from offline.rotate.fuse import fold_norms
from resq_vllm.errors import ResQError

Progress = Callable[[int, int], None]
Store = Callable[[ModelMoments], None]


def moments_fingerprint(runner: LayerRunner, sequences: Sequence[torch.Tensor]) -> str:
    """SHA-256 (hex) over the model's fingerprint and every token id: what saved moments belong to."""
    digest = hashlib.sha256(runner.source.fingerprint().encode())
    for sequence in sequences:
        digest.update(f"{list(sequence.shape)}".encode())
        digest.update(sequence.to(torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def collect_moments(
    runner: LayerRunner,
    sequences: Sequence[torch.Tensor],
    progress: Progress | None = None,
    store: Store | None = None,
    resume: ModelMoments | None = None,
    batch_tokens: int = 4096,
) -> ModelMoments:
    """Run ``sequences`` (LongTensor [1, T] each) through the model and sum the moments of every site.

    RMSNorm weights are folded into the next linears first, so the residual moments are of x/rms(x). After each layer
    ``store`` gets the moments so far and ``progress`` (layers done, layers). With ``resume`` the finished layers are
    run without summing; it must be of this model and these sequences. In memory: one layer, the hidden states, one
    d×d sum.

    Raises ResQError for too few tokens, for a ``resume`` of something else, and for activations that are not finite.
    """
    adapter = runner.adapter
    require_tokens(sequences, adapter.hidden_size, "the calibration set")
    fingerprint = moments_fingerprint(runner, sequences)
    moments = resume or ModelMoments.empty(adapter, fingerprint, runner.device)
    if moments.fingerprint != fingerprint:
        raise ResQError("saved moments are of another model or other calibration text; delete them to calibrate afresh")
    if moments.layers_done == adapter.num_layers:
        return moments
    hiddens = runner.embed(make_batches(sequences, batch_tokens))
    for index in range(adapter.num_layers):
        folded = fold_norms(runner.source.layer_tensors(index), adapter, index, runner.dtype)
        layer = runner.layer(index, folded, copy=False)
        done = index < moments.layers_done
        layer.run(hiddens, None if done else _observers(moments, index))
        del folded, layer  # or it would wait for the next one beside it
        for hidden in hiddens:
            if not bool(torch.isfinite(hidden).all()):
                raise ResQError(
                    f"layer {index}: the activations overflow; check that the weights belong to config.json"
                )
        if not done:
            moments.layers_done = index + 1
            if store is not None:
                store(moments)
        if progress is not None:
            progress(index + 1, adapter.num_layers)
    return moments


def _observers(moments: ModelMoments, index: int) -> dict[Observed, Observer]:
    def value(x: torch.Tensor) -> None:
        # [B, kv, T, hd] -> [kv, B·T, hd]
        moments.value[index].update(x.transpose(0, 1).flatten(1, 2))

    def down(x: torch.Tensor) -> None:
        moments.down[index] += x.reshape(-1, x.shape[-1]).to(moments.down).square().sum(0)

    return {
        "qkv": moments.residual.update,
        "gate_up": moments.residual.update,
        "value": value,
        "key": moments.key[index].update,
        "down": down,
    }
