"""Trains rotations inside their blocks for the loss of the rounded model (SpinQuant, arXiv 2405.16406, section 3.2).

The budget counts the tokens of training steps, forward and backward; the two looks at the held-out batch come on top.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from offline.bases.bases import Rotations
from offline.bases.rotation import named_generator
from offline.models.runner import LayerRunner
from offline.quantize.activations import ActivationQuantizer, KVQuantizer
from offline.rotate.cayley import CayleySGD
from offline.rotate.differentiable import LayerTensors, Objective, RotatedModel
from offline.rotate.trainable import RotationBlocks, TrainableRotations
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import SiteName

logger = logging.getLogger(__name__)

# (steps done, steps, the step's loss in nats a token)
TrainProgress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class TrainOptions:
    """How long and how fast.

    Attributes:
        tokens: budget of training tokens; sequences are used again, in another order, when it is larger than they are.
        batch_tokens: tokens a step; a step takes whole sequences, and at least one. From random rotations, 80k tokens
            on stories3M: evaluation loss 2.015 -> 1.948 with 1024 a step, 1.957 with 2048.
        lr: first step size, decaying linearly to 0 (the paper's 1.5).
        momentum: of the gradient, in [0, 1).
        seed: of the order of the sequences.
        objective: "cross_entropy" (SpinQuant) or "divergence", see :data:`offline.rotate.differentiable.Objective`.

    """

    tokens: int
    batch_tokens: int = 1024
    lr: float = 1.5
    momentum: float = 0.9
    seed: int = 0
    objective: Objective = "cross_entropy"

    def __post_init__(self) -> None:
        """Raises ResQError for a value out of range."""
        if self.batch_tokens < 2:
            raise ResQError(f"training batches of {self.batch_tokens} tokens; give at least 2")
        if self.tokens < self.batch_tokens:
            raise ResQError(
                f"a training budget of {self.tokens} tokens is less than one batch of {self.batch_tokens}; "
                "raise the budget or lower the batch"
            )
        if not (self.lr > 0 and 0 <= self.momentum < 1):
            raise ResQError(
                f"training with lr {self.lr} and momentum {self.momentum}; give lr > 0 and momentum in [0, 1)"
            )


@dataclass(frozen=True)
class Batch:
    """Token ids [B, T], padded on the right with 0, and the number of real tokens of each row [B]."""

    ids: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, sequences: Sequence[torch.Tensor]) -> Batch:
        """Sequences [1, T_i] as one batch."""
        rows = [sequence[0] for sequence in sequences]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return cls(ids, torch.tensor([row.numel() for row in rows]))

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.lengths.sum())


def train_rotations(
    runner: LayerRunner,
    sequences: Sequence[torch.Tensor],
    initial: Rotations,
    blocks: RotationBlocks,
    activations: Mapping[SiteName, ActivationQuantizer],
    kv: Sequence[KVQuantizer],
    hadamard_groups: int,
    options: TrainOptions,
    progress: TrainProgress | None = None,
    layer_tensors: LayerTensors | None = None,
) -> Rotations:
    """U_A and U_B turned inside ``blocks`` by Cayley SGD on the rounded model's loss; U_C stays that of ``initial``.

    One batch of the sequences (at most a quarter of them) is held out of training. The result is the last iterate, for
    the step size has then decayed to 0, unless the held-out loss is above that of ``initial``: then it is ``initial``,
    with a warning. The same options and inputs give the same result on one machine.

    Memory: see :class:`offline.rotate.differentiable.RotatedModel`; the optimizer adds U_A and U_B thrice in float64.

    Args:
        runner: of the model, in float32.
        sequences: calibration LongTensors [1, T]; those of one token, which predict nothing, are passed over.
        initial: the start, float64.
        blocks: where columns may mix.
        activations: quantizer of each site's input ("down" with its online Hadamard).
        kv: quantizer of each layer, holding the U_C of ``initial``.
        hadamard_groups: blocks of H_D, 0 for none.
        options: budget, step size, seed.
        progress: called after each step.
        layer_tensors: the float layers where they are not the model's own (channels in another order).

    Raises:
        ResQError: blocks that do not fit, fewer than two sequences, or a loss that is not finite.

    """
    usable = [sequence for sequence in sequences if sequence.shape[-1] > 1]
    if len(usable) < 2:
        raise ResQError(f"training rotations needs two calibration sequences (one is held out), not {len(usable)}")
    rotations = TrainableRotations(initial, blocks)
    model = RotatedModel(runner, activations, kv, hadamard_groups, layer_tensors, options.objective)
    held_out, training = _hold_out(usable, options)
    batches = list(_batches(training, options))
    if not batches:
        raise ResQError(
            f"a training budget of {options.tokens} tokens is less than one sequence; raise it or shorten the sequences"
        )
    before = _held_out_loss(model, held_out, rotations)
    optimizer = CayleySGD(rotations.parameters(), options.lr, options.momentum)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 - step / len(batches))
        optimizer.zero_grad()
        loss = model.loss(batch.ids, batch.lengths, *rotations())
        if not bool(torch.isfinite(loss)):
            raise ResQError(
                f"training rotations: the loss of step {step + 1} is {loss.item()}; check the model's weights"
            )
        torch.autograd.backward(loss)
        optimizer.step()
        logger.debug("step %d of %d: loss %.4f", step + 1, len(batches), loss.item())
        if progress is not None:
            progress(step + 1, len(batches), loss.item())
    after = _held_out_loss(model, held_out, rotations)
    logger.info("trained rotations: %d steps, held-out loss %.4f -> %.4f", len(batches), before, after)
    # NaN compares false, hence "not <=".
    if not after <= before:
        logger.warning(
            "trained rotations are worse on held-out text (loss %.4f, untrained %.4f): the untrained ones are kept; "
            "raise the token budget or lower the learning rate",
            after,
            before,
        )
        return initial
    return rotations.rotations()


def _hold_out(sequences: Sequence[torch.Tensor], options: TrainOptions) -> tuple[Batch, list[torch.Tensor]]:
    """A batch of sequences drawn at random, at most a quarter of all but at least one, and the others."""
    order = torch.randperm(len(sequences), generator=named_generator(options.seed, "train", "held out")).tolist()
    shuffled = [sequences[i] for i in order]
    most, count, tokens = max(1, len(shuffled) // 4), 1, shuffled[0].numel()
    while count < most and tokens + shuffled[count].numel() <= options.batch_tokens:
        tokens += shuffled[count].numel()
        count += 1
    return Batch.of(shuffled[:count]), shuffled[count:]


def _batches(sequences: Sequence[torch.Tensor], options: TrainOptions) -> Iterator[Batch]:
    """Batches of whole sequences in random order, epoch after epoch, while the next one fits in what is left."""
    left, epoch, size = options.tokens, 0, 0
    current: list[torch.Tensor] = []
    while True:
        order = torch.randperm(len(sequences), generator=named_generator(options.seed, "train", "epoch", epoch))
        for sequence in (sequences[i] for i in order.tolist()):
            if current and size + sequence.numel() > options.batch_tokens:
                if size > left:
                    return
                yield Batch.of(current)
                left, current, size = left - size, [], 0
            current.append(sequence)
            size += sequence.numel()
        epoch += 1


@torch.no_grad()
def _held_out_loss(model: RotatedModel, batch: Batch, rotations: TrainableRotations) -> float:
    return float(model.loss(batch.ids, batch.lengths, *rotations()))
