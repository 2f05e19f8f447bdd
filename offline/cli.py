"""The ``resq`` command: quantize, inspect, eval. Errors of ours are one sentence on stderr and exit code 2."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

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
            help="Calibration text: bundled, a hub data set (wikitext2), FILE.txt, or FILE.jsonl (one text a line)."
        ),
    ] = "bundled",
    nsamples: Annotated[int, typer.Option(help="Calibration sequences.")] = 128,
    seqlen: Annotated[
        int, typer.Option(help="Tokens a sequence, at most; capped at the model's context length.")
    ] = 2048,
    batch_size: Annotated[int, typer.Option(help="Sequences of equal length run together.")] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the random rotations and of the calibration windows.")] = 0,
    device: Annotated[str, typer.Option(help="Where layers run: cpu, cuda, cuda:1.")] = "cpu",
    high_fraction: Annotated[
        float, typer.Option(help="Share of the channels kept at --high-bits; 0 = uniform.")
    ] = 0.125,
    low_bits: Annotated[int, typer.Option(help="Bits of weights and activations of the other channels: 4 or 8.")] = 4,
    high_bits: Annotated[int, typer.Option(help="Bits of the high-precision channels: 8.")] = 8,
    kv_bits: Annotated[
        str,
        typer.Option(help="KV cache: 4 (with --high-fraction at 8), 8, or 16 (vLLM's own); or a list, one a layer."),
    ] = "4",
    o_scales: Annotated[
        Literal["token8", "part", "head"],
        typer.Option(
            help="o_proj activations: one 8-bit scale a token; 4/8-bit scales a token; or a head (the paper)."
        ),
    ] = "token8",
    down_act_bits: Annotated[
        int | None, typer.Option(help="Bits of down_proj's activations: 4 or 8 [--low-bits].")
    ] = None,
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
    (nsamples · seqlen · hidden · 4 bytes). Lower --nsamples or --seqlen when that is too much.
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
        kv_bits=parse_kv_bits(kv_bits),
        o_scales=o_scales,
        down_act_bits=down_act_bits,
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


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="DIR", help="A resq checkpoint, or any Hugging Face model.")],
    dataset: Annotated[
        str, typer.Option(help="bundled (held-out text), wikitext2 (hub, test), FILE.txt, or FILE.jsonl.")
    ] = "bundled",
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
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the result to this file.")] = None,
) -> None:
    """Perplexity of a checkpoint, quantized or not."""
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
    )
    typer.echo(f"perplexity {result['perplexity']:.4f} over {result['tokens']} tokens ({result['engine']})")
    if json_file is not None:
        write_json(json_file, result)


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
    try:
        app()
    except ResQError as error:
        print(f"resq: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
