"""The GGUF writer, read back byte by byte and by the reader of the format's authors."""

from __future__ import annotations

import importlib
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.dummy_model import SHAPES
from benchmarks.gguf_model import ALIGNMENT, F32, Q4_0, TensorSpec, metadata, tensors, write_gguf

SHAPE = replace(SHAPES["1b"], hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512)
SHAPE = replace(SHAPE, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, SHAPE)
    return path


def test_header_counts_tensors_and_entries(file: Path) -> None:
    magic, version, count, entries = struct.unpack("<4sIQQ", file.read_bytes()[:24])
    assert (magic, version) == (b"GGUF", 3)
    assert (count, entries) == (len(tensors(SHAPE)), len(metadata(SHAPE)))


def test_file_holds_all_tensors_and_ends_aligned(file: Path) -> None:
    data = sum(spec.nbytes for spec in tensors(SHAPE))
    size = file.stat().st_size
    assert size % ALIGNMENT == 0
    assert 0 < size - data < 8192


def test_blocks_have_the_scale_that_keeps_activations_finite(file: Path) -> None:
    # The first tensor is the embedding in Q4_0: every 18 bytes begin with the scale.
    data = file.read_bytes()
    start = len(data) - sum(-(-spec.nbytes // ALIGNMENT) * ALIGNMENT for spec in tensors(SHAPE))
    blocks = np.frombuffer(data, np.uint8, 18 * 100, start).reshape(100, 18)
    assert (blocks[:, :2].copy().view(np.float16) == np.float16(0.002)).all()
    assert len(np.unique(blocks[:, 2:])) > 200


def test_bits_are_those_of_the_types() -> None:
    assert TensorSpec("a", (64, 10), Q4_0).nbytes == 20 * 18
    assert TensorSpec("a", (10,), F32).nbytes == 40


def test_row_that_is_no_whole_number_of_blocks() -> None:
    with pytest.raises(ValueError, match=r"blk\.0: rows of 40 are no multiple of a block of 32\."):
        _ = TensorSpec("blk.0", (40, 2), Q4_0).nbytes


def test_authors_reader_finds_the_same(file: Path) -> None:
    reader = importlib.import_module("gguf").GGUFReader(file)
    assert [tensor.name for tensor in reader.tensors] == [spec.name for spec in tensors(SHAPE)]
    assert [tuple(tensor.shape.tolist()) for tensor in reader.tensors] == [spec.shape for spec in tensors(SHAPE)]
    assert [int(tensor.tensor_type) for tensor in reader.tensors] == [spec.kind for spec in tensors(SHAPE)]
    for name, value in metadata(SHAPE).items():
        assert reader.fields[name].contents() == pytest.approx(value)
