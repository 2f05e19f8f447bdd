"""The ``resq`` command. Errors of ours are one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from offline.threads import spin_briefly
from resq_vllm import __version__
from resq_vllm.errors import ResQError

app = typer.Typer(
    name="resq",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize a Hugging Face model with ResQ (arXiv 2412.14363) for vLLM, look into the result, and measure it.",
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hugging Face Hub id.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the tokenizer run code from the model's folder.")]

TASKS_HELP = (
    "lm-eval tasks, comma-separated: names (mmlu, gsm8k), paper (its eight), task files PATH.yaml or folders of them."
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(f"resq-vllm {__version__}")
        raise typer.Exit


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("-o", "--output", "--output_dir", help="Folder to create.")],
    dataset: Annotated[
        str,
        typer.Option(
            help="Calibration text: bundled, a hub data set (wikitext2), FILE.txt, FILE.jsonl (one text a line), or "
            "self (what the model writes)."
        ),
    ] = "bundled",
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[
        int, typer.Option(help="Tokens a sequence, at most; capped at the model's context length.")
    ] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences of equal length run together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random rotations and of the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="Where layers run: cpu, cuda, cuda:1.")] = "cpu",
    method: Annotated[
        Literal["resq", "lqer", "l2qer"],
        typer.Option(
            help="resq; or, for comparison, low-rank corrected W4A8 with (l2qer) or without calibration: no rotation."
        ),
    ] = "resq",
    rank: Annotated[int, typer.Option(help="lqer, l2qer: rank of every linear's correction.")] = 32,
    weight_group: Annotated[
        int,
        typer.Option(help="lqer, l2qer: input columns that share a weight scale, cut to a divisor of the width."),
    ] = 128,
    high_fraction: Annotated[
        float, typer.Option(help="Share of the channels kept at --high-bits; 0 = uniform.")
    ] = 0.125,
    low_bits: Annotated[int, typer.Option(help="Bits of weights and activations of the other channels: 4 or 8.")] = 4,
    high_bits: Annotated[int, typer.Option(help="Bits of the high-precision channels: 8.")] = 8,
    kv_bits: Annotated[
        str | None,
        typer.Option(
            help="KV cache: 4 (with --high-fraction at 8), 8, or 16 (vLLM's own); or a list, one a layer "
            "[4; lqer, l2qer: 16]."
        ),
    ] = None,
    lm_head_bits: Annotated[
        int,
        typer.Option(
            help="Bits of lm_head: 16; 8 for its weights and inputs; or 4 (resq only) for its weights, with "
            "--high-fraction and inputs at 8."
        ),
    ] = 16,
    o_scales: Annotated[
        Literal["token8", "part", "kv", "head"],
        typer.Option(
            help="o_proj inputs: one 8-bit scale a token; or a 4- and an 8-bit scale a token (part), a group of query "
            "heads (kv), or a head (the paper)."
        ),
    ] = "part",
    down_act_bits: Annotated[
        int | None, typer.Option(help="Bits of down_proj's activations: 4 or 8 [--low-bits].")
    ] = None,
    down_high_fraction: Annotated[
        float | None,
        typer.Option(help="Share of down_proj's channels, the strongest, in 8 bits; the paper: 0 [--high-fraction]."),
    ] = None,
    compensate: Annotated[
        bool, typer.Option(help="Let weights make up for what was rounded before them (the paper does not).")
    ] = True,
    rtn: Annotated[
        bool, typer.Option("--rtn", help="Round to nearest instead of GPTQ: faster, less accurate.")
    ] = False,
    ignore_layers: Annotated[
        str, typer.Option(help="Linear modules to leave in 16 bits: names, prefixes or re:REGEX, comma-separated.")
    ] = "",
    max_tp: Annotated[int, typer.Option(help="Largest tensor-parallel degree that the checkpoint must serve.")] = 8,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows for the model card's perplexity; 0 = none.")] = 16,
    trust_remote_code: Trust = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was killed (same flags).")] = False,
) -> None:
    """Quantize MODEL to a folder that ``vllm serve`` takes as it is.

    Works layer by layer; memory: the embedding, two decoder layers in float32 and the calibration activations
    (nsamples · seqlen · hidden · 4 bytes, twice with compensation). Lower --nsamples or --seqlen when that is too much.
    """
    from offline.pipeline.options import QuantizeOptions, parse_kv_bits
    from offline.pipeline.run import run

    options = QuantizeOptions.checked(
        model=model,
        output=output,
        dataset=dataset,
        nsamples=nsamples,
        seqlen=seqlen,
        batch_size=batch_size,
        seed=seed,
        device=device,
        high_fraction=high_fraction,
        low_bits=low_bits,
        high_bits=high_bits,
        method=method,
        rank=rank,
        weight_group=weight_group,
        kv_bits=parse_kv_bits(kv_bits or ("4" if method == "resq" else "16")),
        lm_head_bits=lm_head_bits,
        o_scales=o_scales,
        down_act_bits=down_act_bits,
        down_high_fraction=down_high_fraction,
        compensate=compensate,
        rtn=rtn,
        ignore_layers=tuple(part.strip() for part in ignore_layers.split(",") if part.strip()),
        max_tp=max_tp,
        eval_windows=eval_windows,
        trust_remote_code=trust_remote_code,
    )
    try:
        run(options, resume=resume)
    except KeyboardInterrupt:
        print("resq: interrupted; the same command with --resume goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by resq quantize.")],
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Show what is in a checkpoint: layers, bits, bytes, KV bytes a token, variance captured per site."""
    from offline.inspect import inspect_checkpoint

    report = inspect_checkpoint(directory)
    report.print()
    if json_file is not None:
        write_json(json_file, report.to_dict())


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint written by resq quantize.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FOLDER", help="Where the page goes. [DIR-report]")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also show this comparison (written by resq compare --json).")
    ] = None,
) -> None:
    """Write a page about a checkpoint: spectra, quantization errors, sizes, perplexity, recipe; one HTML file."""
    from offline.report.write import write_report

    typer.echo(f"{write_report(directory, output, compare)} is ready")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A resq checkpoint, or any Hugging Face model.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Perplexity on: bundled (held-out text), wikitext2 (hub, test), FILE.txt, or FILE.jsonl "
            "[bundled, or none with --tasks]."
        ),
    ] = None,
    engine: Annotated[
        Literal["reference", "vllm"], typer.Option(help="Plain torch in float32, or the served kernels in vLLM.")
    ] = "reference",
    seqlen: Annotated[
        int | None, typer.Option(help="Tokens a window [2048, or the context length if shorter].")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="At most this many windows (or texts).")] = None,
    naive_rtn: Annotated[
        bool, typer.Option("--naive-rtn", help="Quantize a plain model naively on the fly (W4A4KV4, no rotation).")
    ] = False,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "--tp", help="vLLM only.")] = 1,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="vLLM only: no torch.compile.")] = False,
    tasks: Annotated[str, typer.Option(help=TASKS_HELP)] = "",
    task_limit: Annotated[int | None, typer.Option(help="Documents a task, at most.")] = None,
    trust_remote_code: Trust = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Perplexity, or accuracies in lm-eval tasks, of a checkpoint, quantized or not."""
    from offline.compare.options import parse_list
    from offline.evaluate.run import evaluate_model

    result = evaluate_model(
        model,
        dataset=dataset,
        engine=engine,
        seqlen=seqlen,
        windows=windows,
        naive_rtn=naive_rtn,
        tensor_parallel_size=tensor_parallel_size,
        enforce_eager=enforce_eager,
        tasks=parse_list(tasks),
        task_limit=task_limit,
        trust_remote_code=trust_remote_code,
    )
    if "perplexity" in result:
        typer.echo(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens ({engine})")
    accuracies = result.get("tasks", {})
    assert isinstance(accuracies, dict)
    for name, accuracy in accuracies.items():
        typer.echo(f"{name} {accuracy:.2%} ({engine})")
    if json_file is not None:
        write_json(json_file, result)


@app.command()
def compare(
    model: Model,
    methods: Annotated[str, typer.Option(help="Methods, comma-separated, such as bf16,rtn,quarot,resq [all].")] = "",
    dataset: Annotated[
        str, typer.Option(help="Perplexity on: bundled, wikitext2, FILE.txt, or FILE.jsonl.")
    ] = "bundled",
    text: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FILE", help="Perplexity on this text as well; repeat for more.")
    ] = None,
    tasks: Annotated[str, typer.Option(help=TASKS_HELP)] = "",
    task_limit: Annotated[int | None, typer.Option(help="Documents a task, at most.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: bundled, wikitext2, FILE.txt, FILE.jsonl, or self (what the model writes) [the "
            "training side of --dataset; self where that is a file]."
        ),
    ] = None,
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(help="Tokens a calibration sequence and a window, at most.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="At most this many windows (or texts) [all].")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random rotations and of the calibration windows.")] = 0,
    train_tokens: Annotated[int, typer.Option(help="Tokens that trained rotations (SpinQuant) see.")] = 65536,
    learning_rate: Annotated[float, typer.Option(help="First step size of trained rotations.")] = 1.5,
    high_fraction: Annotated[float, typer.Option(help="Share of the channels that ResQ keeps in 8 bits.")] = 0.125,
    kv_bits: Annotated[str, typer.Option(help="ResQ's KV cache: 4, 8 or 16, or a list, one a layer.")] = "4",
    ablations: Annotated[
        str, typer.Option(help="Add rows of ResQ with one choice changed: all, or names (no-ua, low-3, high-1/4, …).")
    ] = "",
    trust_remote_code: Trust = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder of tables, plots and finished rows [compare-MODEL].")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Quantize MODEL by every method, measure all alike, and print and write the table.

    Finished rows are kept in the output folder: a run that was killed goes on, and a repeated one only reads.
    """
    from offline.compare.command import run_compare
    from offline.compare.options import CompareOptions, parse_list, parse_texts
    from offline.methods.engine import open_engine
    from offline.methods.registry import chosen_ablations
    from offline.pipeline.options import parse_kv_bits

    named, extra = parse_list(methods), tuple(chosen_ablations(parse_list(ablations)))
    options = CompareOptions.checked(
        model=model,
        methods=tuple(dict.fromkeys(named + extra)) if named else (),
        dataset=dataset,
        texts=parse_texts(text or ()),
        tasks=parse_list(tasks),
        task_limit=task_limit,
        calibration=calibration,
        nsamples=nsamples,
        seqlen=seqlen,
        windows=windows,
        seed=seed,
        train_tokens=train_tokens,
        learning_rate=learning_rate,
        high_fraction=high_fraction,
        kv_bits=parse_kv_bits(kv_bits),
        ablations=extra,
        trust_remote_code=trust_remote_code,
    )
    try:
        run_compare(options, open_engine, output, json_file)
    except KeyboardInterrupt:
        print("resq: interrupted; the same command goes on after the last finished row", file=sys.stderr)
        raise typer.Exit(130) from None


def write_json(path: Path, value: dict[str, object]) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ResQError(f"cannot write {path} ({error.strerror}); give --json a file in a writable folder") from error


def main() -> None:
    """Entry point: a ResQError becomes one sentence on stderr and exit code 2."""
    spin_briefly()
    try:
        app()
    except ResQError as error:
        print(f"resq: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
