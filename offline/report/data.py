"""Everything that the report shows about a checkpoint, gathered from its folder."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from offline.bases.bases import Bases
from offline.inspect import CheckpointReport, inspect_checkpoint
from offline.pack.reader import ResQCheckpoint
from offline.report.comparison import Comparison, read_comparison
from offline.report.stats import CheckpointStats, read_stats
from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import QuantizationMetadata, high_count


@dataclass(frozen=True)
class ReportData:
    """A checkpoint's facts; what its folder lacks is None.

    Attributes:
        directory: the folder as the user named it.
        contents: what ``resq inspect`` counts.
        metadata: ``quantization_config``.
        stats: errors and perplexities measured while it was quantized.
        bases: U_A, U_B, U_C before their random rotations.
        comparison: other methods on some model.

    """

    directory: Path
    contents: CheckpointReport
    metadata: QuantizationMetadata
    stats: CheckpointStats | None
    bases: Bases | None
    comparison: Comparison | None

    @property
    def name(self) -> str:
        """Of the checkpoint: its folder's."""
        return self.directory.resolve().name

    @property
    def base_model(self) -> str:
        """What was quantized, as the recipe has it."""
        return str(self.metadata.recipe.get("model", "a model"))

    @property
    def method(self) -> str:
        """The recipe's method: GPTQ or RTN of ResQ, or another one's name."""
        return str(self.metadata.recipe.get("method", "an unrecorded method"))

    @property
    def method_label(self) -> str:
        """In print."""
        return {"GPTQ": "ResQ and GPTQ", "RTN": "ResQ, rounded to nearest,"}.get(self.method, self.method)

    @property
    def gptq(self) -> bool:
        """Whether weights were rounded with GPTQ rather than to nearest."""
        return self.method.upper() != "RTN"

    @property
    def high_hidden(self) -> int:
        """Directions of the residual stream in the high part."""
        return self.metadata.sites["qkv"].high

    @property
    def high_head(self) -> int:
        """Dims of a head in the high part."""
        return high_count(self.metadata.head_dim, self.metadata.high_fraction)

    @property
    def serve_command(self) -> str:
        """For a shell, from the folder in which the report was made."""
        return f"vllm serve {shlex.quote(str(self.directory))}"

    @property
    def kv_ratio(self) -> float:
        """How many times smaller than bf16 the KV cache is."""
        return self.contents.kv_bytes_per_token_bf16 / self.contents.kv_bytes_per_token


def gather(directory: Path, compare: Path | None = None) -> ReportData:
    """Read a checkpoint folder; raises ResQError for what is no ResQ checkpoint, or is damaged."""
    if not directory.is_dir():
        raise ResQError(f"{directory}: no such folder; give one that resq quantize wrote")
    comparison = None if compare is None else read_comparison(compare)
    contents = inspect_checkpoint(directory)
    checkpoint = ResQCheckpoint(directory)
    return ReportData(
        directory=directory,
        contents=contents,
        metadata=checkpoint.metadata,
        stats=read_stats(directory),
        bases=None if checkpoint.basis_path is None else Bases.load(checkpoint.basis_path),
        comparison=comparison,
    )
