"""The engine behind ``resq compare``: a model with its tokens on the bench, and every method by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from tqdm import tqdm

from offline.calibrate.generated import calibration_sequences
from offline.compare.cache import fingerprint
from offline.compare.engine import MethodResult
from offline.compare.options import CompareOptions, chosen_methods
from offline.compare.texts import MAIN, evaluation_sequences
from offline.evaluate.sequences import DEFAULT_SEQLEN
from offline.methods.assemble import WholeModel
from offline.methods.lab import Lab, Progress
from offline.methods.method import Method
from offline.methods.registry import MethodOptions, ablations, chosen_ablations, methods
from offline.methods.run import run_method
from offline.models.runner import LayerRunner
from offline.models.source import ModelSource


class LabEngine:
    """Implements :class:`offline.compare.engine.Engine` on a :class:`offline.methods.lab.Lab`."""

    def __init__(self, lab: Lab, known: dict[str, Method], options: CompareOptions, tokenizer: Any) -> None:
        self._lab, self._known, self._options, self._tokenizer = lab, known, options, tokenizer
        self._smaller: dict[int, Lab] = {}

    def add(self, method: Method) -> None:
        """Another row, under its own name."""
        self._known[method.name] = method

    def methods(self) -> Mapping[str, str]:
        """Label by name."""
        return {name: method.label for name, method in self._known.items()}

    def protocol(self) -> Mapping[str, JsonValue]:
        """How perplexity is measured."""
        text = self._lab.texts[MAIN]
        return {
            "dataset": text.name,
            "average": text.protocol,
            "sequences": len(text.ids),
            "tokens": text.predicted_tokens,
            "seqlen": text.seqlen,
            "arithmetic": "fake quantization in float32",
        }

    def calibration(self) -> Mapping[str, JsonValue]:
        """What methods are calibrated on."""
        sequences = self._lab.calibration
        return {
            "text": self._options.calibration_text,
            "sequences": len(sequences),
            "tokens": sum(s.numel() for s in sequences),
            "seed": self._options.seed,
        }

    def fingerprint(self, method: str) -> str:
        """Over model, tokens and the method's settings."""
        chosen = self._known[method]
        settings: dict[str, JsonValue] = {"method": method, "seed": self._lab.seed, **_json(chosen.settings())}
        lab = self._bench(chosen)
        texts = {name: text.ids for name, text in lab.texts.items()}
        return fingerprint(lab.source.folder, lab.calibration, texts, settings)

    def run(self, method: str, with_model: bool) -> MethodResult:
        """Quantize and measure."""
        chosen = self._known[method]
        lab = self._bench(chosen)
        whole = WholeModel(lab) if with_model else None
        measured = run_method(lab, chosen, whole)
        return MethodResult(
            ppl=measured.perplexity[MAIN].value,
            ppl_by_text={name: p.value for name, p in measured.perplexity.items() if name != MAIN},
            weight_bits=measured.weight_bits,
            activation_bits=measured.activation_bits,
            kv_bits=measured.kv_bits,
            seconds=measured.seconds,
            tokens=measured.perplexity[MAIN].tokens,
            settings=_json(chosen.settings()),
            note=chosen.source,
            model=None if whole is None else whole.model(),
            tokenizer=self._tokenizer if with_model else None,
        )

    def _bench(self, method: Method) -> Lab:
        """The lab, or one with fewer calibration sequences where the method asks for that."""
        samples = method.samples
        if samples is None or samples >= len(self._lab.calibration):
            return self._lab
        if samples not in self._smaller:
            lab = self._lab
            sequences = lab.calibration[:samples]
            self._smaller[samples] = Lab(lab.runner, sequences, lab.texts, lab.seed, lab.batch_tokens, lab.progress)
        return self._smaller[samples]


def _json(settings: Mapping[str, object]) -> dict[str, JsonValue]:
    """Tuples as lists, as they will be read back."""
    values: dict[str, JsonValue] = json.loads(json.dumps(settings))
    return values


class Bars:
    """One progress bar at a time, for the step that is being done; gone when it is."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def __call__(self, step: str, done: int, total: int) -> None:
        """The lab's progress: ``done`` of ``total`` layers or training steps."""
        if self._bar is None:
            self._bar = tqdm(total=total, leave=False)
        self._bar.set_description(step, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self._bar.close()
            self._bar = None


def open_engine(
    model: str, options: CompareOptions, output: Path | None = None, progress: Progress | None = None
) -> LabEngine:
    """Open the model and tokenize; ``output`` keeps calibration text that the model wrote.

    Raises ResQError for a model, text or option that does not fit.
    """
    settings = MethodOptions(options.high_fraction, options.train_tokens, options.learning_rate, options.kv_bits)
    known = methods(settings) | chosen_ablations(options.ablations, settings)
    # An ablation may also be asked for like any method.
    named = tuple(name for name in options.methods if name in ablations(settings))
    known |= chosen_ablations(named, settings)
    chosen_methods(options.methods, known)
    source = ModelSource.open(model)
    tokenizer = source.tokenizer(options.trust_remote_code)
    context = int(getattr(source.config, "max_position_embeddings", None) or DEFAULT_SEQLEN)
    texts = evaluation_sequences(options, tokenizer, context)
    seqlen = min(options.seqlen, context)
    keep = None if output is None else output / "calibration.json"
    calibration = calibration_sequences(
        options.calibration_text, source, tokenizer, options.nsamples, seqlen, options.seed, keep
    )
    longest = max(s.numel() for s in calibration)
    lab = Lab(LayerRunner(source), calibration, texts, options.seed, max(4096, longest), progress or Bars())
    return LabEngine(lab, known, options, tokenizer)
