"""The whole of ``resq quantize``.

Two passes over the model, one decoder layer in memory at a time. The first runs the float model and sums second
moments (-> bases); the second rotates and fuses each layer, quantizes it on what the quantized layers before it put
out, and keeps its checkpoint tensors in the work folder. Memory: the embedding, two decoder layers in float32 and the
calibration activations.
"""

from __future__ import annotations

import logging
import resource
from collections.abc import Callable

import torch
from tqdm import tqdm

from offline.bases.bases import FILE_NAME, Bases, Rotations
from offline.calibrate.collect import collect_moments, moments_fingerprint
from offline.calibrate.data import load_sequences
from offline.calibrate.moments import ModelMoments
from offline.card import model_card
from offline.evaluate.dataset import load_dataset
from offline.evaluate.perplexity import Perplexity
from offline.evaluate.sequences import Sequences, tokenizer_sequences
from offline.evaluate.streaming import streaming_perplexity
from offline.models.runner import LayerRunner, make_batches
from offline.models.source import ModelSource
from offline.pack.writer import check_free
from offline.pipeline.layers import LayerQuantizer
from offline.pipeline.options import QuantizeOptions
from offline.pipeline.publish import publish
from offline.pipeline.served import served_layer
from offline.pipeline.sites import build_metadata
from offline.pipeline.workfolder import WorkFolder
from offline.rotate.fuse import fuse_embedding, fuse_layer, fuse_lm_head
from resq_vllm import __version__
from resq_vllm.formats.metadata import QuantizationMetadata, high_count

logger = logging.getLogger("resq")
DEFAULT_CONTEXT = 2048


def run(options: QuantizeOptions, resume: bool = False) -> None:
    """Quantize ``options.model`` into ``options.output``.

    Raises ResQError for bad input before any work is done; a run that fails later leaves nothing behind, one that is
    killed (or fails with ``resume``) leaves ``OUTPUT.resq-work`` to continue from.
    """
    check_free(options.output)
    source = ModelSource.open(options.model)
    metadata = build_metadata(source.adapter, options)
    tokenizer = source.tokenizer(options.trust_remote_code)
    context = int(getattr(source.config, "max_position_embeddings", None) or DEFAULT_CONTEXT)
    sequences = load_sequences(
        options.dataset,
        tokenizer,
        options.nsamples,
        min(options.seqlen, context),
        options.seed,
        source.adapter.hidden_size,
    )
    text = None
    if options.eval_windows:
        text = tokenizer_sequences(tokenizer, load_dataset("bundled"), context, limit=options.eval_windows)
    runner = LayerRunner(source, device=options.device)
    fingerprint = moments_fingerprint(runner, sequences)
    work = WorkFolder.beside(options.output)
    work.open({"tool": __version__, "model or calibration text": fingerprint} | options.deciding(), resume)
    with work.cleared_on_error(keep=resume):
        _Run(options, source, metadata, runner, sequences, text, fingerprint, work).all()
    work.remove()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{options.output} is ready (peak memory {peak:.1f} GiB); serve it with: vllm serve {options.output}")


class _Run:
    """One run's pieces, in the order in which they are used."""

    def __init__(
        self,
        options: QuantizeOptions,
        source: ModelSource,
        metadata: QuantizationMetadata,
        runner: LayerRunner,
        sequences: list[torch.Tensor],
        text: Sequences | None,
        fingerprint: str,
        work: WorkFolder,
    ) -> None:
        self.options = options
        self.source = source
        self.adapter = source.adapter
        self.metadata = metadata
        self.runner = runner
        self.sequences = sequences
        self.text = text
        self.fingerprint = fingerprint
        self.work = work
        self.quantizer = LayerQuantizer(runner, metadata, source.dtype, options.rtn)

    def all(self) -> None:
        bases = self.bases()
        high_hidden = high_count(self.adapter.hidden_size, self.options.high_fraction)
        high_head = high_count(self.adapter.head_dim, self.options.high_fraction)
        rotations = bases.compose(high_hidden, high_head, self.options.seed).to(self.runner.device)
        top = self.top_tensors(rotations)
        self.layers(rotations, top)
        before, after = self.perplexities(rotations, top, self.text) if self.text else (None, None)
        publish(
            self.options.output,
            self.source,
            self.metadata,
            top,
            lambda index: self.work.load(_step(index)),
            self.work.path / FILE_NAME,
            model_card(self.source, self.metadata, self.options.output.name, before, after),
            # A run that is killed here leaves its half-written folder where --resume cleans up.
            self.work.path,
        )

    def bases(self) -> Bases:
        """Pass 1, or what an earlier run saved of it."""
        path = self.work.path / FILE_NAME
        if path.exists():
            return Bases.load(path, self.fingerprint)
        saved = self.work.path / "moments.safetensors"
        earlier = ModelMoments.load(saved, self.fingerprint, self.options.device) if saved.exists() else None
        with _bar("(1/3) calibrating", self.adapter.num_layers) as update:
            moments = collect_moments(
                self.runner, self.sequences, update, lambda m: m.save(saved), earlier, self.batch_tokens
            )
        bases = Bases.from_moments(moments)
        bases.save(path)
        saved.unlink(missing_ok=True)
        return bases

    @property
    def batch_tokens(self) -> int:
        return self.options.batch_size * max(s.numel() for s in self.sequences)

    def top_tensors(self, rotations: Rotations) -> dict[str, torch.Tensor]:
        """Embedding, final norm and lm_head in the model's dtype; the embedding is untied from lm_head."""
        dtype, norm = self.source.dtype, self.source.final_norm()
        return {
            self.adapter.embedding: fuse_embedding(self.source.embedding(), rotations.residual, dtype),
            self.adapter.final_norm: torch.ones_like(norm),
            self.adapter.lm_head: fuse_lm_head(self.source.lm_head(), norm, rotations.residual, dtype),
        }

    def layers(self, rotations: Rotations, top: dict[str, torch.Tensor]) -> None:
        """Pass 2: every layer's checkpoint tensors into the work folder."""
        hiddens: list[torch.Tensor] = []
        if not self.options.rtn:
            hiddens = self.runner.embed(make_batches(self.sequences, self.batch_tokens), top[self.adapter.embedding])
        groups = self.metadata.sites["down"].hadamard_groups
        with _bar("(2/3) quantizing", self.adapter.num_layers) as update:
            for index in range(self.adapter.num_layers):
                if self.work.has(_step(index)):
                    if hiddens:
                        self.quantizer.restore(index, self.work.load(_step(index))).run(hiddens)
                else:
                    rotation = rotations.layer(index)
                    kept = 0 if self.quantizer.site_ignored(index, "down") else groups
                    fused = fuse_layer(self.source.layer_tensors(index), self.adapter, index, rotation, kept)
                    self.work.save(_step(index), self.quantizer.quantize(index, fused, rotation.key.cpu(), hiddens))
                update(index + 1, self.adapter.num_layers)

    def perplexities(
        self, rotations: Rotations, top: dict[str, torch.Tensor], text: Sequences
    ) -> tuple[Perplexity, Perplexity]:
        """Of the model and of the checkpoint, on the bundled held-out text, for the model card."""
        source, adapter = self.source, self.adapter
        with _bar("(3/3) measuring", 2 * adapter.num_layers) as update:
            before = streaming_perplexity(
                self.runner,
                text,
                self.runner.layer,
                source.embedding(),
                source.final_norm(),
                source.lm_head(),
                update,
            )
            after = streaming_perplexity(
                self.runner,
                text,
                lambda i: served_layer(
                    self.quantizer, self.metadata, i, self.work.load(_step(i)), rotations.layer(i).key
                ),
                top[adapter.embedding],
                top[adapter.final_norm],
                top[adapter.lm_head],
                lambda done, layers: update(layers + done, 2 * layers),
            )
        print(f"perplexity {before.value:.3f} -> {after.value:.3f} on {after.tokens} tokens of the {after.dataset}")
        return before, after


def _step(index: int) -> str:
    return f"layer-{index:05d}"


class _bar:  # noqa: N801 (used like a function)
    """A tqdm bar that is told (done, total)."""

    def __init__(self, description: str, total: int) -> None:
        self._bar: tqdm = tqdm(total=total, desc=description, unit="layer")

    def __enter__(self) -> Callable[[int, int], None]:
        return self._update

    def _update(self, done: int, total: int) -> None:
        self._bar.update(done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        self._bar.close()
