"""A comparison of methods as ``resq compare --json`` writes it, read for the report's table and plot."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from resq_vllm.errors import ResQError, invalid_field

Bits = Annotated[float, Field(gt=0, le=32, allow_inf_nan=False)]
# JSON has no infinity: a ruined model's perplexity is written as null.
_Ruinable = Annotated[float, BeforeValidator(lambda value: math.inf if value is None else value), Field(ge=1)]


class Row(BaseModel):
    """One method. Bits are means over all quantized layers, with what the method keeps high counted in."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    method: str
    ppl: _Ruinable
    weight_bits: Bits
    activation_bits: Bits
    kv_bits: Bits
    label: str = ""
    note: str = ""

    @property
    def name(self) -> str:
        """In print."""
        return self.label or self.method

    @property
    def average_bits(self) -> float:
        """Mean of the three widths."""
        return (self.weight_bits + self.activation_bits + self.kv_bits) / 3


class Comparison(BaseModel):
    """What the report needs of the file; further fields are for other readers."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    rows: list[Row] = Field(min_length=1)
    protocol: dict[str, Any] = {}


def read_comparison(path: Path) -> Comparison:
    """Raises ResQError naming file and field when it is missing or no comparison."""
    try:
        return Comparison.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ResQError(
            f"--compare {path}: cannot be read ({error.strerror}); give the file that resq compare --json wrote"
        ) from error
    except ValidationError as error:
        problem = invalid_field(error, "the file")
        raise ResQError(f"--compare {path}: {problem}; give the file that resq compare --json wrote") from error
