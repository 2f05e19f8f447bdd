"""A GGUF file of a Llama-type model with random blocks, as `llama-quantize … Q4_0` would lay it out.

Layout (GGUF 3): magic, version, number of tensors and of metadata entries; the entries; name, shape, type and offset of
every tensor; then the tensors' data, each aligned to 32 bytes. Shapes are written fastest dimension first. As that tool
does, linear layers and the embedding are Q4_0 (blocks of 32: a float16 scale, 16 bytes of nibbles), the output layer is
Q6_K (superblocks of 256 in 210 bytes), norms are float32.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from benchmarks.dummy_model import POSITIONS, Shape

ALIGNMENT = 32
# Codes of the format: value types of metadata, element types of tensors.
_UINT32, _FLOAT32, _STRING = 4, 6, 8
F32, Q4_0, Q6_K = 0, 2, 14
# Elements and bytes of a block.
_BLOCKS = {F32: (1, 4), Q4_0: (32, 18), Q6_K: (256, 210)}
_FILE_TYPE_Q4_0 = 2
# Keeps activations of a deep random model finite.
_SCALE = np.float16(0.002)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the file; `shape` fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    kind: int

    @property
    def nbytes(self) -> int:
        """Size of its data.

        Raises:
            ValueError: when its rows are no whole number of blocks.

        """
        elements, size = _BLOCKS[self.kind]
        if self.shape[0] % elements:
            raise ValueError(f"{self.name}: rows of {self.shape[0]} are no multiple of a block of {elements}.")
        return int(np.prod(self.shape)) // elements * size


def tensors(shape: Shape) -> list[TensorSpec]:
    """All tensors of the model, by llama.cpp's names."""
    hidden, ffn = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    found = [TensorSpec("token_embd.weight", (hidden, shape.vocab_size), Q4_0)]
    for layer in range(shape.num_hidden_layers):
        linears = {
            "attn_q": (hidden, query),
            "attn_k": (hidden, key),
            "attn_v": (hidden, key),
            "attn_output": (query, hidden),
            "ffn_gate": (hidden, ffn),
            "ffn_up": (hidden, ffn),
            "ffn_down": (ffn, hidden),
        }
        found += [TensorSpec(f"blk.{layer}.{name}.weight", sizes, Q4_0) for name, sizes in linears.items()]
        found += [TensorSpec(f"blk.{layer}.{name}.weight", (hidden,), F32) for name in ("attn_norm", "ffn_norm")]
    found.append(TensorSpec("output_norm.weight", (hidden,), F32))
    found.append(TensorSpec("output.weight", (hidden, shape.vocab_size), Q6_K))
    return found


def metadata(shape: Shape) -> dict[str, str | int | float]:
    """What llama.cpp must know; without a tokenizer ("none"), since only token numbers are sent."""
    return {
        "general.architecture": "llama",
        "general.name": "random blocks",
        "general.file_type": _FILE_TYPE_Q4_0,
        "llama.context_length": POSITIONS,
        "llama.embedding_length": shape.hidden_size,
        "llama.block_count": shape.num_hidden_layers,
        "llama.feed_forward_length": shape.intermediate_size,
        "llama.attention.head_count": shape.num_attention_heads,
        "llama.attention.head_count_kv": shape.num_key_value_heads,
        "llama.attention.key_length": shape.head_dim,
        "llama.attention.value_length": shape.head_dim,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": shape.head_dim,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": shape.vocab_size,
        "tokenizer.ggml.model": "none",
    }


def _text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def _entry(name: str, value: str | float) -> bytes:
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, int):
        return _text(name) + struct.pack("<II", _UINT32, value)
    return _text(name) + struct.pack("<If", _FLOAT32, value)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _header(shape: Shape, specs: list[TensorSpec]) -> bytes:
    entries = metadata(shape)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(specs), len(entries))
    head += b"".join(_entry(name, value) for name, value in entries.items())
    offset = 0
    for spec in specs:
        sizes = struct.pack(f"<I{len(spec.shape)}Q", len(spec.shape), *spec.shape)
        head += _text(spec.name) + sizes + struct.pack("<IQ", spec.kind, offset)
        offset += _padded(spec.nbytes)
    return head.ljust(_padded(len(head)), b"\0")


def _data(spec: TensorSpec, generator: np.random.Generator) -> Iterator[bytes]:
    if spec.kind == F32:
        yield np.ones(spec.shape, np.float32).tobytes()
        return
    _, size = _BLOCKS[spec.kind]
    blocks = generator.integers(0, 256, (spec.nbytes // size, size), dtype=np.uint8)
    scale = np.frombuffer(_SCALE.tobytes(), np.uint8)
    # Q4_0 begins with its scale, Q6_K ends with it.
    blocks[:, slice(0, 2) if spec.kind == Q4_0 else slice(size - 2, size)] = scale
    yield blocks.tobytes()


def write_gguf(path: Path, shape: Shape) -> int:
    """Write the file; returns the bytes of its tensors."""
    specs = tensors(shape)
    generator = np.random.default_rng(0)
    stream: BinaryIO
    with path.open("wb") as stream:
        stream.write(_header(shape, specs))
        for spec in specs:
            for part in _data(spec, generator):
                stream.write(part)
            stream.write(b"\0" * (_padded(spec.nbytes) - spec.nbytes))
    return sum(spec.nbytes for spec in specs)
