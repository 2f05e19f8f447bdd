"""``resq_stats.json`` of a checkpoint: the errors measured while it was made, and its perplexities.

Every error is relative and squared, ‖x̂ − x‖²/‖x‖² summed over the sampled tokens: 0.01 means that the error carries 1 %
of the energy (20 dB).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError

from offline.evaluate.perplexity import Perplexity
from resq_vllm.errors import ResQError, invalid_field
from resq_vllm.formats.metadata import SiteName

FILE_NAME = "resq_stats.json"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoundingError(_Strict):
    """Of what is rounded while serving (a site's input, K, V).

    ``before``: in the model's own axes, same bits, the high ones given to the channels of largest second moment;
    ``after``: in the rotated axes, as served.
    """

    before: float = Field(ge=0)
    after: float = Field(ge=0)


class WeightError(_Strict):
    """Of what depends on the weights.

    ``before``: the model's own weights rounded to nearest; ``rotated``: the rotated weights rounded to nearest;
    ``after``: the rotated weights as stored, by GPTQ unless the recipe says otherwise. Same bits throughout.
    """

    before: float = Field(ge=0)
    rotated: float = Field(ge=0)
    after: float = Field(ge=0)


class SiteErrors(_Strict):
    """One linear site of one layer; of several linears (q, k, v) together. The output is counted without its bias."""

    activation: RoundingError
    weight: WeightError
    output: WeightError


class LayerErrors(_Strict):
    """One decoder layer. Sites in 16 bits are absent; ``key`` and ``value`` are None for a 16-bit cache."""

    sites: dict[SiteName, SiteErrors] = {}
    key: RoundingError | None = None
    value: RoundingError | None = None


# JSON has no infinity: the perplexity of a model that is ruined beyond exp(700) is written as null.
_Ruinable = Annotated[
    float,
    BeforeValidator(lambda value: math.inf if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
]


class PerplexityRecord(_Strict):
    """A :class:`offline.evaluate.perplexity.Perplexity`."""

    value: _Ruinable
    dataset: str
    protocol: str
    sequences: int
    tokens: int
    seqlen: int

    @classmethod
    def of(cls, result: Perplexity | None) -> Self | None:
        """None stays None: the perplexity was not measured."""
        if result is None:
            return None
        return cls(
            value=result.value,
            dataset=result.dataset,
            protocol=result.protocol,
            sequences=result.sequences,
            tokens=result.tokens,
            seqlen=result.seqlen,
        )


class CheckpointStats(_Strict):
    """The whole file.

    Attributes:
        format_version: 1.
        tool_version: of resq-vllm.
        tokens: calibration tokens that the errors were measured on; 0 without layers.
        layers: one entry a decoder layer, or none where the method measures none.
        perplexity_before: of the source model.
        perplexity_after: of the checkpoint, on the same tokens.

    """

    format_version: Literal[1] = 1
    tool_version: str
    tokens: int = Field(default=0, ge=0)
    layers: list[LayerErrors] = []
    perplexity_before: PerplexityRecord | None = None
    perplexity_after: PerplexityRecord | None = None


def read_stats(folder: Path) -> CheckpointStats | None:
    """The stats of a checkpoint folder, or None where it has none (an older release wrote it).

    Raises ResQError naming file and field when the file is damaged or of a later format.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return None
    try:
        return CheckpointStats.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResQError(f"{path} cannot be read ({error.strerror}); check its permissions") from error
    except ValidationError as error:
        problem = invalid_field(error, "the file")
        raise ResQError(f"{path}: {problem}; delete the file to do without, or quantize the model again") from error
