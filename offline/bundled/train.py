"""Train the bundled model from scratch on the running Python's standard library.

    python -m offline.bundled.train --tokens 16000000

A killed run resumes from its last checkpoint. The schedule runs over tokens, over seconds, or whichever ends first.
"""

import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from offline.bundled import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_DIR
from offline.bundled.corpus import Corpus, build_corpus, calibration_text, heldout_text
from offline.bundled.heldout import heldout_loss, heldout_windows
from offline.bundled.tokenizer import VOCABULARY, load_tokenizer, train_tokenizer
from resq_vllm.errors import ResQError

logger = logging.getLogger(__name__)

CONTEXT = 1024
BATCH_TOKENS = 2048
PEAK_LR = 3e-3
WARMUP_STEPS = 200
# Standard deviation of log(s) in spread_gains. On a model of 6 M tokens, W4A4 round-to-nearest raised the perplexity
# 1.1 times without it, 1.3 times with 0.5 and 4.2 times with 0.75.
GAIN_SPREAD = 0.7
REPORTS = 8
LICENSE_NOTE = """\
The weights and the tokenizer in this folder were trained for this repository, from scratch, on the source and
documentation of CPython's standard library (Python Software Foundation License Version 2,
https://docs.python.org/3/license.html; Copyright (c) 2001 Python Software Foundation; All Rights Reserved).
They are distributed under this repository's licence; text that the model reproduces verbatim from the standard
library remains under the PSF licence.
"""


@dataclass(frozen=True)
class Stage:
    """Window length in tokens, used while the run's progress is below `until` (0..1)."""

    window: int
    until: float


# Short windows first: attention costs least where most of the language is learnt; the last stage reaches CONTEXT.
STAGES = (Stage(256, 0.75), Stage(CONTEXT, math.inf))


@dataclass
class Progress:
    """What a resumed run continues from. `seconds` counts training time only, summed over restarts."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    gains_spread: bool = False

    def fraction(self, token_budget: int, second_budget: float) -> float:
        """Share of the schedule done: 1 where either budget is spent."""
        return min(1.0, max(self.tokens / token_budget, self.seconds / second_budget))


def model_config() -> LlamaConfig:
    """Llama, 5.8 M parameters, tied embeddings."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=3,
    )


@torch.no_grad()
def spread_gains(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer) -> None:
    """Scale every gain of the layer norms by a log-normal s, and the columns that read it by 1/s: the same function.

    Models of billions of parameters and tokens have input channels 10-20 times larger than the median, which is what
    makes 4-bit activations hard. A model this small and this briefly trained has none (at most 3 times) and would be
    untypically easy to quantize. Training goes on from here with Adam's moments scaled to match.
    """
    generator = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            scale = torch.exp(GAIN_SPREAD * torch.randn(norm.weight.shape, generator=generator))
            for parameter, factor in ((norm.weight, scale), *((reader.weight, 1 / scale) for reader in readers)):
                parameter.mul_(factor)
                state = optimizer.state[parameter]
                # A parameter w·f has the gradient g/f.
                state["exp_avg"].div_(factor)
                state["exp_avg_sq"].div_(factor.square())


def learning_rate(progress: Progress, fraction: float, peak: float) -> float:
    """Linear warm-up over WARMUP_STEPS, then a cosine over the schedule down to zero."""
    return peak * min(1.0, (progress.step + 1) / WARMUP_STEPS) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def token_stream(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, epoch: int) -> torch.Tensor:
    """All training tokens of one epoch, int64 [n]: documents in a seeded order, EOS behind each."""
    generator = torch.Generator().manual_seed(1000 + epoch)
    order = torch.randperm(len(corpus.training), generator=generator).tolist()
    texts = [document.text for document in corpus.training]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([*encoded[index], tokenizer.eos_token_id]) for index in order])


def batches(stream: torch.Tensor, window: int, bos: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless [BATCH_TOKENS/window, window+1] int64 batches; every row is BOS and `window` tokens of the stream."""
    generator = torch.Generator().manual_seed(seed)
    rows = BATCH_TOKENS // window
    while True:
        # A fresh offset each pass, so that windows do not always begin at the same places.
        offset = int(torch.randint(window, (1,), generator=generator))
        count = (stream.numel() - offset) // window
        body = stream[offset : offset + count * window].view(count, window)
        body = body[torch.randperm(count, generator=generator)]
        for start in range(0, count - rows + 1, rows):
            yield F.pad(body[start : start + rows], (1, 0), value=bos)


def loss_function(model: LlamaForCausalLM, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    """Mean next-token loss of a batch [rows, window+1] under bf16 autocast."""

    def loss(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=batch[:, :-1]).last_hidden_state
            logits = F.linear(hidden, model.lm_head.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if compiled else loss


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: Path, destination: Path) -> None:
    """Write the bf16 checkpoint, tokenizer, licence note and log; each file is replaced as a whole."""
    destination.mkdir(parents=True, exist_ok=True)
    copy = LlamaForCausalLM(model_config()).to(torch.bfloat16)
    copy.load_state_dict(model.state_dict())
    # Greedy text of a model this small soon repeats itself; servers take these as their defaults.
    copy.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=1, pad_token_id=3, do_sample=True, temperature=0.7, top_p=0.9
    )
    with tempfile.TemporaryDirectory(dir=destination.parent) as folder:
        temporary = Path(folder)
        copy.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        (temporary / "LICENSE").write_text(LICENSE_NOTE, encoding="utf-8")
        if log.is_file():
            shutil.copyfile(log, temporary / "training_log.txt")
        for path in sorted(temporary.iterdir()):
            path.chmod(0o644)  # safetensors writes files that only their owner may read
            os.replace(path, destination / path.name)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """torch.save through a temporary name, so that a kill leaves the older checkpoint."""
    temporary = path.with_suffix(".partial")
    torch.save(state, temporary)
    os.replace(temporary, path)


def run(work: Path, destination: Path, token_budget: int, second_budget: float, peak: float, compiled: bool) -> None:
    """Train until the schedule ends; logs, checkpoints and exports REPORTS times on the way."""
    work.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus()
    if (work / "tokenizer" / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(work / "tokenizer")
    else:
        tokenizer = train_tokenizer((document.text for document in corpus.training), CONTEXT)
        tokenizer.save_pretrained(work / "tokenizer")
    stream = token_stream(corpus, tokenizer, 0)
    windows = heldout_windows(tokenizer, HELDOUT_TEXT.read_text(encoding="utf-8"))
    logger.info("%d training tokens, %d held-out windows", stream.numel(), windows.shape[0])

    torch.manual_seed(0)
    model = LlamaForCausalLM(model_config())
    # No weight decay: nothing holds back the outlier channels and sink tokens that larger models have too.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, fused=True
    )
    progress = Progress()
    checkpoint, log = work / "checkpoint.pt", work / "training_log.txt"
    if checkpoint.is_file():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        progress = Progress(**state["progress"])
        # What a killed run logged behind its last checkpoint is trained, and logged, again.
        kept = [
            line for line in log.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= progress.step
        ]
        log.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    step_loss = loss_function(model, compiled)

    rows: Iterator[torch.Tensor] | None = None
    window = 0
    recent: list[float] = []
    reported = int(progress.fraction(token_budget, second_budget) * REPORTS)
    while (fraction := progress.fraction(token_budget, second_budget)) < 1.0:
        began = time.monotonic()
        stage = next(stage for stage in STAGES if fraction < stage.until)
        if stage is STAGES[-1] and not progress.gains_spread:
            spread_gains(model, optimizer)
            progress.gains_spread = True
        if rows is None or stage.window != window:
            window = stage.window
            rows = batches(stream, window, tokenizer.bos_token_id, seed=progress.step)
        rate = learning_rate(progress, fraction, peak)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = step_loss(next(rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(loss.item())
        progress.step += 1
        progress.tokens += BATCH_TOKENS
        progress.seconds += time.monotonic() - began
        done = progress.fraction(token_budget, second_budget)
        due = done >= 1.0 or int(done * REPORTS) > reported
        if progress.step % 100 and not due:
            continue
        record: dict[str, float] = {"step": progress.step, "tokens": progress.tokens, "lr": round(rate, 7)}
        record |= {"train_loss": round(sum(recent) / len(recent), 4), "seconds": round(progress.seconds, 1)}
        recent.clear()
        if due:
            reported = int(done * REPORTS)
            with torch.autocast("cpu", torch.bfloat16):
                record["heldout_loss"] = round(heldout_loss(model, windows), 4)
        with log.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(record) + "\n")
        logger.info("%s", record)
        if due:
            optimizer_state = optimizer.state_dict()
            save_checkpoint(
                checkpoint, {"model": model.state_dict(), "optimizer": optimizer_state, "progress": vars(progress)}
            )
            export(model, tokenizer, log, destination)


def main(
    tokens: Annotated[int, typer.Option(min=BATCH_TOKENS, help="Schedule length in tokens.")] = 16_000_000,
    minutes: Annotated[float, typer.Option(help="Schedule length in training minutes, where that ends first.")] = 1e6,
    work: Annotated[Path, typer.Option(help="Folder of checkpoints and log; delete it to start over.")] = Path(
        "build/bundled"
    ),
    destination: Annotated[Path, typer.Option(help="Folder of the exported model.")] = MODEL_DIR,
    peak_lr: Annotated[float, typer.Option(help="Peak learning rate.")] = PEAK_LR,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
    texts_only: Annotated[bool, typer.Option(help="Only write calibration.txt and heldout.txt.")] = False,
) -> None:
    """Train the bundled model, or write the committed texts."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if texts_only:
        corpus = build_corpus()
        CALIBRATION_TEXT.write_text(calibration_text(corpus), encoding="utf-8")
        HELDOUT_TEXT.write_text(heldout_text(corpus), encoding="utf-8")
        return
    if not torch.backends.mkldnn.is_available():
        raise ResQError("this PyTorch has no oneDNN; install a CPU build with oneDNN to train in bf16")
    torch.set_num_threads(threads)
    run(work, destination, tokens, minutes * 60.0, peak_lr, compiled)


if __name__ == "__main__":
    typer.run(main)
