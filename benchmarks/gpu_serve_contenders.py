"""Who takes part in benchmarks.gpu_serve, in which cells, and the folders of their models (no weights)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.dummy_model import CONFIGS, SHAPES, Shape, resq_config, write_model
from benchmarks.scenarios import Cell, Scenario

BASELINE = "bf16"
# Llama 3's, whose output layer is a seventh of the 8B model's weights in 4 bits.
VOCABULARY = 128_256
OUTPUT_TOKENS = 64
# Of every contender's CUDA graphs: vLLM's own list has fifty sizes, whose capture takes longer than many a cell.
CAPTURE_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True)
class Contender:
    """`model`: key of MODELS; `options`: arguments of vLLM's engine (names of EngineArgs)."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)


def _kv_only(shape: Shape) -> dict[str, Any]:
    """The packed KV cache under bf16 linear layers: all of them on the ignore list."""
    config = resq_config(shape)
    return config | {"quantization_config": config["quantization_config"] | {"ignore": ["model"]}}


MODELS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "bf16": CONFIGS["bf16"],
    "resq": CONFIGS["resq"],
    "resq-kv": _kv_only,
    "gptq": CONFIGS["gptq"],
}

# The most telling first: time may run out.
CONTENDERS: dict[str, Contender] = {
    BASELINE: Contender("bf16"),
    "resq": Contender("resq"),
    "resq-kv": Contender("resq-kv"),
    "fp8-w8a8": Contender("bf16", {"quantization": "fp8"}),
    "w4a16": Contender("gptq"),
    "int4-kv": Contender("bf16", {"kv_cache_dtype": "int4_per_token_head"}),
    "turboquant-kv": Contender("bf16", {"kv_cache_dtype": "turboquant_4bit_nc"}),
    "resq-weights": Contender("resq", {"kv_cache_dtype": "bfloat16"}),
}


def cell(streams: int, context: int, output: int = OUTPUT_TOKENS) -> Cell:
    """`streams` requests at a time, each with `context` prompt tokens."""
    return Cell(Scenario(f"{context}", context, output), streams)


# The most telling first, again.
CELLS = tuple(
    cell(streams, context)
    for streams, context in (
        (64, 4096),
        (1, 1024),
        (256, 1024),
        (16, 8192),
        (64, 1024),
        (64, 8192),
        (16, 1024),
        (1, 8192),
        (16, 32768),
        (1, 32768),
        (256, 8192),
        (64, 32768),
        (256, 32768),
    )
)


def parse_cell(text: str) -> Cell:
    """ "64x4096" -> 64 streams of 4096 prompt tokens.

    Raises:
        ValueError: for anything else.
    """
    streams, _, context = text.partition("x")
    if not (streams.isdigit() and context.isdigit() and int(streams) and int(context)):
        raise ValueError(f"{text!r} is no cell: write STREAMSxCONTEXT, such as 64x4096.")
    return cell(int(streams), int(context))


def key(measured: Cell) -> str:
    """Inverse of parse_cell."""
    return f"{measured.streams}x{measured.scenario.prompt}"


def model_folder(folder: Path, shape: str, contender: Contender, longest: int) -> Path:
    """Write the contender's model of a shape for requests of up to `longest` tokens; returns its folder."""
    target = folder / f"{shape}-{contender.model}-{longest}"
    if not target.exists():
        config = MODELS[contender.model](SHAPES[shape].with_vocabulary(VOCABULARY))
        write_model(target, config | {"max_position_embeddings": longest})
    return target
