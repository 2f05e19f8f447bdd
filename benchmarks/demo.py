"""`make demo`: quantize the bundled model, serve it with vLLM beside bf16, and print what was gained and lost.

Everything is measured here and now on this machine. What takes long and depends on nothing but the sources (the
checkpoint, the perplexities) is kept in demo/ until they change; the servers are started every time.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.cache import ResultCache, fingerprint, sources
from benchmarks.client import chat, complete, connect, generation_rate, served_name, stream
from benchmarks.demo_report import DemoResults, print_report
from benchmarks.environment import vllm_environment
from benchmarks.machine import machine, today
from benchmarks.pairs import interleave
from benchmarks.server import ServerError, VLLMServer
from offline.bundled import CALIBRATION_TEXT, HELDOUT_TEXT, MODEL_DIR
from offline.pack.names import BASIS_FILE
from offline.pipeline.workfolder import WorkFolder

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "demo"
CHECKPOINT = DEMO / "checkpoint"
RESQ = Path(sys.executable).with_name("resq")

KV_CACHE_BYTES = 64 * 2**20
FLAGS = ("--max-model-len", "1024", "--max-num-seqs", "16", "--kv-cache-memory-bytes", str(KV_CACHE_BYTES))
PROMPTS_AT_ONCE = 8
TOKENS_EACH = 128
ROUNDS = 7
# The processes of a vLLM server poll for a second after their last request, on the cores of the other server.
SETTLE_SECONDS = 1.5
QUESTION_TOKENS = 48
PROMPT_CHARACTERS = 200
# The bundled model knows Python sources: a chat message is a docstring to it, and its answer the code below.
CHAT_MESSAGE = "Return the larger of two numbers."
STREAM_PROMPT = "def read_lines(path):\n    "


class DemoError(RuntimeError):
    """A step failed; the message is one sentence."""


@dataclass(frozen=True)
class Evaluation:
    """One perplexity: its name in results.json, the model, and the flags of `resq eval`."""

    name: str
    model: Path
    flags: tuple[str, ...]


EVALUATIONS = (
    Evaluation("bf16_reference", MODEL_DIR, ("--engine", "reference")),
    Evaluation("bf16_vllm", MODEL_DIR, ("--engine", "vllm")),
    Evaluation("naive_rtn_reference", MODEL_DIR, ("--engine", "reference", "--naive-rtn")),
    Evaluation("resq_reference", CHECKPOINT, ("--engine", "reference")),
    Evaluation("resq_vllm", CHECKPOINT, ("--engine", "vllm")),
)


def run_resq(*arguments: str, log: Path | None = None) -> None:
    """Run the `resq` command as a user would, its output going to the terminal or to `log`.

    Raises:
        DemoError: when it fails, with the last line of the log if there is one.
    """
    with contextlib.ExitStack() as stack:
        output = None if log is None else stack.enter_context(log.open("w"))
        done = subprocess.run([RESQ, *arguments], stdout=output, stderr=output, env=vllm_environment(), check=False)
    if done.returncode == 0:
        return
    ended = f"by signal {-done.returncode}" if done.returncode < 0 else f"with status {done.returncode}"
    command = f"`resq {' '.join(arguments)}` ended {ended}"
    if log is None:
        raise DemoError(f"{command}, see its message above.")
    lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    raise DemoError(f"{command}: {lines[-1]} (whole output in {relative(log)}).")


def sources_fingerprint() -> str:
    """Fingerprint of everything that the checkpoint and its perplexity depend on."""
    files = [*sources(ROOT / "resq_vllm"), *sources(ROOT / "offline"), *sources(ROOT / "csrc"), ROOT / "setup.py"]
    files += [CALIBRATION_TEXT, HELDOUT_TEXT, *(path for path in MODEL_DIR.iterdir() if path.is_file())]
    facts = machine()
    return fingerprint(files, {"packages": facts.packages, "flags": facts.flags})


def quantize(console: Console, cache: ResultCache, key: str) -> float:
    """Quantize the bundled model into demo/checkpoint unless it lies there already; seconds that it took."""
    if not (CHECKPOINT / "config.json").exists() or not cache.valid("quantize", key):
        shutil.rmtree(CHECKPOINT, ignore_errors=True)
        # Half-done work of an interrupted run: from scratch, so that the seconds below are those of a whole run.
        WorkFolder.beside(CHECKPOINT).remove()
        cache.forget("quantize")
        console.print(
            f"quantizing the bundled model: resq quantize {relative(MODEL_DIR)} -o {relative(CHECKPOINT)}",
            soft_wrap=True,
        )

    def work() -> float:
        started = time.perf_counter()
        run_resq("quantize", str(MODEL_DIR), "-o", str(CHECKPOINT))
        return time.perf_counter() - started

    seconds: float = cache.get("quantize", key, work)
    return seconds


def evaluate(console: Console, cache: ResultCache, key: str, wanted: Evaluation) -> float:
    """Perplexity of one evaluation on the bundled held-out text."""

    def work() -> float:
        console.print(
            f"evaluating {wanted.name}: resq eval {relative(wanted.model)} {' '.join(wanted.flags)}", soft_wrap=True
        )
        answer = DEMO / "logs" / f"{wanted.name}.json"
        answer.unlink(missing_ok=True)
        arguments = ("eval", str(wanted.model), *wanted.flags, "--dataset", "bundled", "--json", str(answer))
        run_resq(*arguments, log=DEMO / "logs" / f"{wanted.name}.log")
        return float(json.loads(answer.read_text())["perplexity"])

    perplexity: float = cache.get(f"perplexity {wanted.name}", key, work)
    return perplexity


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files that a server loads from a checkpoint folder (the saved bases are not served)."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors") if path.name != BASIS_FILE)


def questions() -> list[str]:
    """Openings of passages of the held-out text, evenly spread over it.

    Raises:
        DemoError: when the text has too few passages that are long enough.
    """
    passages = [passage for passage in HELDOUT_TEXT.read_text().split("\n\n\n") if len(passage) > 2 * PROMPT_CHARACTERS]
    if len(passages) < PROMPTS_AT_ONCE:
        raise DemoError(f"{HELDOUT_TEXT} has {len(passages)} passages to continue, {PROMPTS_AT_ONCE} are needed.")
    spread = passages[:: len(passages) // PROMPTS_AT_ONCE][:PROMPTS_AT_ONCE]
    return [passage[:PROMPT_CHARACTERS].rpartition("\n")[0] or passage[:PROMPT_CHARACTERS] for passage in spread]


def ask(console: Console, servers: dict[str, VLLMServer], prompt: str) -> dict[str, str]:
    """A completion from both, then a chat answer and a streamed completion of ours, through the OpenAI client."""

    def show(title: str, question: str) -> None:
        console.print(f"[bold]{title}[/] of", highlight=False)
        console.print(question, style="dim", markup=False, highlight=False)

    def generated(text: str, end: str = "\n") -> None:
        console.print(text, end=end, style="green", markup=False, highlight=False, soft_wrap=True)

    show("completion", prompt)
    completions = {}
    for name, server in servers.items():
        with connect(server.api_url) as client:
            completions[name] = complete(client, prompt, QUESTION_TOKENS)
        console.print(f"[bold]by {name}:[/]")
        generated(completions[name])
    with connect(servers["resq"].api_url) as client:
        show("chat answer", CHAT_MESSAGE)
        answer = chat(client, CHAT_MESSAGE, QUESTION_TOKENS)
        generated(answer)
        show("streamed completion", STREAM_PROMPT)
        pieces = []
        for piece in stream(client, STREAM_PROMPT, QUESTION_TOKENS):
            pieces.append(piece)
            generated(piece, end="")
        console.print()
    return {
        "prompt": prompt,
        **{f"completion_{name}": text for name, text in completions.items()},
        "chat": answer,
        "streamed": "".join(pieces),
    }


def serve_and_measure(console: Console) -> tuple[dict[str, int], dict[str, Any], dict[str, str]]:
    """Both servers at once: KV-cache tokens, the paired generation rates, and the generated texts of ours."""
    prompts = questions()
    with contextlib.ExitStack() as stack:
        servers: dict[str, VLLMServer] = {}
        for name, model in (("resq", CHECKPOINT), ("bf16", MODEL_DIR)):
            console.print(
                f"starting {name}: vllm serve {relative(model)} {' '.join(FLAGS)}", highlight=False, soft_wrap=True
            )
            log = DEMO / "logs" / f"serve-{name}.log"
            servers[name] = stack.enter_context(VLLMServer(model, *FLAGS, log=log))
        kv_tokens = {name: server.kv_tokens() for name, server in servers.items()}
        texts = ask(console, servers, prompts[0])
        console.print(f"measuring: {ROUNDS} rounds in turn, {PROMPTS_AT_ONCE} requests of {TOKENS_EACH} tokens at once")
        contenders = {}
        for name, server in servers.items():
            contenders[name] = rate_of(server, prompts)
            contenders[name]()  # warm-up: the first batch of this size is not timed
        rates = interleave(contenders, ROUNDS, baseline="bf16")
    return kv_tokens, rates.to_dict(), texts


def rate_of(server: VLLMServer, prompts: list[str]) -> Callable[[], float]:
    """The measurement of one server as a function without arguments: generated tokens per second."""
    with connect(server.api_url) as client:
        model_name = served_name(client)

    def measure() -> float:
        time.sleep(SETTLE_SECONDS)
        return generation_rate(server.api_url, model_name, prompts, TOKENS_EACH)

    return measure


def relative(path: Path) -> str:
    """A path as a reader in the repository would write it."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def run(console: Console) -> DemoResults:
    """All steps; writes demo/results.json."""
    started = time.perf_counter()
    facts = machine()
    console.print(f"[bold]resq-vllm demo[/] on {facts.sentence()}", highlight=False)
    (DEMO / "logs").mkdir(parents=True, exist_ok=True)
    cache = ResultCache(DEMO / "cache.json")
    key = sources_fingerprint()
    quantize_seconds = quantize(console, cache, key)
    perplexity = {wanted.name: evaluate(console, cache, key, wanted) for wanted in EVALUATIONS}
    kv_tokens, rates, texts = serve_and_measure(console)
    results = DemoResults(
        date=today(),
        machine=facts.to_dict(),
        perplexity=perplexity,
        checkpoint_bytes={"bf16": weight_bytes(MODEL_DIR), "resq": weight_bytes(CHECKPOINT)},
        kv_cache_bytes=KV_CACHE_BYTES,
        kv_cache_tokens=kv_tokens,
        tokens_per_second=rates,
        texts=texts,
        quantize_seconds=round(quantize_seconds, 1),
        seconds=round(time.perf_counter() - started, 1),
    )
    (DEMO / "results.json").write_text(json.dumps(results.to_dict(), indent=2) + "\n")
    return results


def main() -> int:
    """Command-line entry; returns the exit status."""
    console = Console()
    # `kill` and a timeout's SIGTERM must leave through the context managers that stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        results = run(console)
    except (DemoError, ServerError) as error:
        print(f"make demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "make demo: interrupted; the servers are stopped, and finished steps are kept for the next run.",
            file=sys.stderr,
        )
        return 130
    print_report(console, results)
    console.print(
        f"\nServe it again: [bold]{relative(RESQ.with_name('vllm'))} serve {relative(CHECKPOINT)}[/]"
        f"\nFigures: {relative(DEMO / 'results.json')}, logs: {relative(DEMO / 'logs')}",
        highlight=False,
        soft_wrap=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
