"""Puts a finished checkpoint together: shards, bases, config, tokenizer and licence, model card; then renames it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from offline.models.source import ModelSource
from offline.pack.names import CONFIG_FILE
from offline.pack.writer import CheckpointWriter
from offline.report.stats import FILE_NAME as STATS_FILE
from offline.report.stats import CheckpointStats
from resq_vllm.formats.metadata import QuantizationMetadata

# What a server or a reader needs of the source folder besides weights and config.json.
COPIED = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)


def checkpoint_config(source: ModelSource, metadata: QuantizationMetadata) -> dict[str, object]:
    """config.json: the model's own, untied (the rotated embedding and lm_head differ), with the quantization_config."""
    config = dict(source.raw_config)
    config["tie_word_embeddings"] = False
    config["quantization_config"] = metadata.model_dump(mode="json")
    return config


def copied_files(folder: Path) -> list[Path]:
    """Files of the source folder that go along, each once, in name order."""
    found = {path for pattern in COPIED for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def publish(
    output: Path,
    source: ModelSource,
    metadata: QuantizationMetadata,
    embedding: Callable[[], torch.Tensor],
    layer_tensors: Callable[[int], dict[str, torch.Tensor]],
    head: Callable[[], dict[str, torch.Tensor]],
    basis: Path | None,
    card: str,
    stats: CheckpointStats,
    scratch: Path,
) -> Path:
    """Write everything to a temporary folder in ``scratch`` (of the same disk) and rename it to ``output``.

    embedding, layer_tensors, head: checkpoint tensors of embedding, of a layer, of final norm and lm_head, each asked
    for when it is written; basis: the finished bases file, if any; card: text of README.md; stats: what was measured on
    the way. Raises ResQError when the disk is full or ``output`` has appeared meanwhile; nothing is left behind.
    """
    adapter = source.adapter
    with CheckpointWriter(output, scratch=scratch) as writer:
        writer.add({adapter.embedding: embedding()})
        for index in range(adapter.num_layers):
            writer.add(layer_tensors(index))
        writer.add(head())
        if basis is not None:
            writer.copy(basis)
        writer.write_json(CONFIG_FILE, checkpoint_config(source, metadata))
        for path in copied_files(source.folder):
            writer.copy(path)
        writer.write_text("README.md", card)
        writer.write_json(STATS_FILE, stats.model_dump(mode="json"))
        return writer.finalise()
