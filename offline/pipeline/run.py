"""The whole of ``resq quantize``.

Two passes over the model, one decoder layer in memory at a time. The first runs the float model and sums second
moments (-> bases); the second rotates and fuses each layer, quantizes it on what the quantized layers before it put
out, and keeps its checkpoint tensors in the work folder; lm_head comes last, since its 4-bit columns are rounded for
what the last layer puts out. Memory: two decoder layers in float32, the calibration activations (twice in pass 2: the
float model's run beside the quantized one's) and one matrix of second moments. The embedding waits in the work folder
meanwhile, and lm_head is read when the activations are gone.
"""

from __future__ import annotations

import logging
from functools import cached_property

import torch

from offline.bases.bases import FILE_NAME, Bases, LayerRotation, Rotations
from offline.calibrate.collect import collect_moments, moments_fingerprint
from offline.calibrate.generated import calibration_sequences
from offline.calibrate.moments import ModelMoments
from offline.card import model_card
from offline.evaluate.dataset import load_dataset
from offline.evaluate.perplexity import Perplexity
from offline.evaluate.sequences import tokenizer_sequences
from offline.memory import memory_bound, peak_memory, resident_memory
from offline.models.runner import LayerRunner, make_batches
from offline.models.source import ModelSource
from offline.pack.writer import check_free
from offline.pipeline.job import Job, bar, step
from offline.pipeline.layers import CalibrationStates, LayerQuantizer
from offline.pipeline.lqer import LQERJob, lqer_metadata
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.publish import publish
from offline.pipeline.served import served_layer
from offline.pipeline.sites import build_down_layout, build_metadata
from offline.pipeline.workfolder import WorkFolder
from offline.quantize.lm_head import head_hessian, reads_calibration
from offline.report.measure import LayerMeasurement, leading_tokens
from offline.report.stats import CheckpointStats, LayerErrors, PerplexityRecord
from offline.rotate.channels import order_down
from offline.rotate.fuse import fuse_embedding, fuse_layer, fuse_lm_head
from resq_vllm import __version__
from resq_vllm.formats.metadata import high_count
from resq_vllm.memory import return_large_blocks

logger = logging.getLogger("resq")
DEFAULT_CONTEXT = 2048
_EMBEDDING, _HEAD = "embedding", "lm_head"


def run(options: QuantizeOptions, resume: bool = False) -> None:
    """Quantize ``options.model`` into ``options.output``.

    Raises ResQError for bad input before any work is done; a run that fails later leaves nothing behind, one that is
    killed (or fails with ``resume``) leaves ``OUTPUT.resq-work`` to continue from.
    """
    check_free(options.output)
    return_large_blocks()
    program = resident_memory()
    source = ModelSource.open(options.model)
    lqer = options.method != "resq"
    metadata = lqer_metadata(source.adapter, options) if lqer else build_metadata(source.adapter, options)
    tokenizer = source.tokenizer(options.trust_remote_code)
    context = int(getattr(source.config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    sequences = calibration_sequences(
        options.dataset, source, tokenizer, options.nsamples, min(options.seqlen, context), options.seed
    )
    text = None
    if options.eval_windows:
        text = tokenizer_sequences(tokenizer, load_dataset("bundled"), context, limit=options.eval_windows)
    if not source.adapter.tied:
        source.lm_head()  # needed last: a damaged one is to end the run now, not after hours
    runner = LayerRunner(source, device=options.device)
    fingerprint = moments_fingerprint(runner, sequences)
    work = WorkFolder.beside(options.output)
    work.open({"tool": __version__, "model or calibration text": fingerprint} | options.deciding(), resume)
    with work.cleared_on_error(keep=resume):
        kind: type[Job] = LQERJob if lqer else _ResQJob
        kind(options, source, metadata, runner, sequences, text, fingerprint, work).all()
    work.remove()
    bound = memory_bound(source.adapter, sum(s.numel() for s in sequences))
    peak = peak_memory()
    print(
        f"peak memory {peak:.2f} GiB: the program {program:.2f}, the model {peak - program:.2f} (its embedding, two "
        f"decoder layers and the calibration activations in float32: {bound:.2f})"
    )
    print(f"{options.output} is ready; serve it with: vllm serve {options.output}")


class _ResQJob(Job):
    """ResQ's steps, in the order in which they are used."""

    @cached_property
    def quantizer(self) -> LayerQuantizer:
        return LayerQuantizer(self.runner, self.metadata, self.source.dtype, self.options.rtn)

    def all(self) -> None:
        rotations, energy = self.rotations()
        self.save_embedding(rotations)
        self.save_head(rotations, self.layers(rotations, energy))
        before, after = self.perplexities(
            lambda i: served_layer(self.quantizer, i, self.layer_tensors(i), rotations.layer(i).key)
        )
        publish(
            self.options.output,
            self.source,
            self.metadata,
            self.embedding,
            self.layer_tensors,
            self.head,
            self.work.path / FILE_NAME,
            model_card(self.source, self.metadata, self.options.output.name, before, after),
            self.stats(before, after),
            # A run that is killed here leaves its half-written folder where --resume cleans up.
            self.work.path,
        )

    def rotations(self) -> tuple[Rotations, torch.Tensor]:
        """U_A, U_B and U_C, and the mean energy [L, f] of down_proj's input channels."""
        bases = self.bases()
        high_hidden = high_count(self.adapter.hidden_size, self.options.high_fraction)
        high_head = high_count(self.adapter.head_dim, self.options.high_fraction)
        return bases.compose(high_hidden, high_head, self.options.seed).to(self.runner.device), bases.down_energy

    def bases(self) -> Bases:
        """Pass 1, or what an earlier run saved of it."""
        path = self.work.path / FILE_NAME
        if path.exists():
            return Bases.load(path, self.fingerprint)
        saved = self.work.path / "moments.safetensors"
        earlier = ModelMoments.load(saved, self.fingerprint, self.options.device) if saved.exists() else None
        with bar("(1/3) calibrating", self.adapter.num_layers) as update:
            moments = collect_moments(
                self.runner, self.sequences, update, lambda m: m.save(saved), earlier, self.batch_tokens
            )
        bases = Bases.from_moments(moments)
        bases.save(path)
        saved.unlink(missing_ok=True)
        return bases

    def save_embedding(self, rotations: Rotations) -> None:
        """The embedding into the work folder, in the model's dtype: it is not needed while layers are quantized."""
        if not self.work.has(_EMBEDDING):
            table = fuse_embedding(self.source.embedding(), rotations.residual, self.source.dtype)
            self.work.save(_EMBEDDING, {self.adapter.embedding: table})

    def save_head(self, rotations: Rotations, hessian: torch.Tensor | None) -> None:
        """Final norm and lm_head, in the model's dtype or packed, into the work folder; ``hessian``: of its input.

        lm_head is untied from the embedding by its rotation.
        """
        if self.work.has(_HEAD):
            return
        norm = self.source.final_norm()
        head = self.head_tensors(lambda rows, dtype: fuse_lm_head(rows, norm, rotations.residual, dtype), hessian)
        self.work.save(_HEAD, {self.adapter.final_norm: torch.ones_like(norm)} | head)

    def embedding(self) -> torch.Tensor:
        return self.work.load(_EMBEDDING)[self.adapter.embedding]

    def head(self) -> dict[str, torch.Tensor]:
        return self.work.load(_HEAD)

    def layers(self, rotations: Rotations, energy: torch.Tensor) -> torch.Tensor | None:
        """Pass 2: every layer's checkpoint tensors into the work folder; energy [L, f]: of down_proj's channels.

        Returns the Hessian [d, d] of lm_head's input where that is still to be rounded by it.
        """
        batches = make_batches(self.sequences, self.batch_tokens)
        # Rounding to nearest looks at no activations; a sample of them is run for the errors alone.
        batches = leading_tokens(batches) if self.options.rtn else batches
        hiddens = self.runner.embed(batches, self.embedding())
        compensates = self.options.compensate and not self.options.rtn
        states = CalibrationStates(hiddens, list(hiddens) if compensates else None)
        with bar("(2/3) quantizing", self.adapter.num_layers) as update:
            for index in range(self.adapter.num_layers):
                self.layer(index, rotations.layer(index), states, energy[index])
                update(index + 1, self.adapter.num_layers)
        if self.work.has(_HEAD) or not reads_calibration(self.metadata.lm_head_site, self.options.rtn):
            return None
        return head_hessian(self.runner, torch.ones_like(self.source.final_norm()), states.hiddens)

    def layer(self, index: int, rotation: LayerRotation, states: CalibrationStates, energy: torch.Tensor) -> None:
        """One layer of pass 2; states: moved past it."""
        kept = 0 if self.quantizer.site_ignored(index, "down") else self.metadata.sites["down"].hadamard_groups
        layout = build_down_layout(self.adapter, self.options)
        original = order_down(self.source.layer_tensors(index), self.adapter, index, energy, layout)
        fused = fuse_layer(original, self.adapter, index, rotation, kept)
        if self.work.has(step(index)):
            return self.quantizer.skip(index, fused, rotation.key, self.layer_tensors(index), states)
        errors = LayerMeasurement(self.adapter, self.metadata, self.quantizer.plans, index, original, rotation)
        tensors = self.quantizer.quantize(index, fused, rotation.key.cpu(), states, errors)
        self.work.save_record(step(index), errors.errors())
        return self.work.save(step(index), tensors)

    def stats(self, before: Perplexity | None, after: Perplexity | None) -> CheckpointStats:
        """What ``resq report`` shows beside the checkpoint's own contents."""
        sample = leading_tokens(make_batches(self.sequences, self.batch_tokens))
        return CheckpointStats(
            tool_version=__version__,
            tokens=sum(batch.numel() for batch in sample),
            layers=[self.work.load_record(step(i), LayerErrors) for i in range(self.adapter.num_layers)],
            perplexity_before=PerplexityRecord.of(before),
            perplexity_after=PerplexityRecord.of(after),
        )
