"""``quantization_config`` of a ResQ checkpoint's config.json: everything that kernels must know, and nothing assumed.

Format 1. Per linear site the metadata says how many input columns are low and high, the bits of weights and
activations, which columns share an activation scale and how the online Hadamard is cut; per layer how K and V are kept.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resq_vllm.errors import ResQError

FORMAT_VERSION = 1
QUANT_METHOD = "resq"
SiteName = Literal["qkv", "o", "gate_up", "down"]
SITES: tuple[SiteName, ...] = ("qkv", "o", "gate_up", "down")


def high_count(dim: int, fraction: float) -> int:
    """Columns of ``dim`` that stay at high precision: dim·fraction, rounded to an even number (nibbles pair up)."""
    return 2 * round(dim * fraction / 2)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinearSite(_Strict):
    """One kind of linear layer (qkv, o, gate_up, down), the same in every decoder block.

    ``scales`` says what shares a per-token activation scale (all scales are asymmetric, with a zero point):

    =======  =====================================================================
    token    the whole input (``act_low_bits`` bits)
    part     the low columns one, the high columns another
    head     as ``part``, per attention head (the paper's o_proj)
    block    as ``part``, per block of the online Hadamard (the paper has one block)
    =======  =====================================================================

    ``order``: "contiguous" = [all low | all high]; "heads" = every head is [low | high]. ``low`` and ``high`` count the
    input columns of the whole layer over all ranks.
    """

    low: int = Field(ge=0)
    high: int = Field(ge=0)
    weight_low_bits: Literal[4, 8] = 4
    weight_high_bits: Literal[8] = 8
    act_low_bits: Literal[4, 8] = 4
    act_high_bits: Literal[4, 8] = 8
    scales: Literal["token", "part", "head", "block"] = "part"
    order: Literal["contiguous", "heads"] = "contiguous"
    hadamard_groups: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> LinearSite:
        if self.scales == "head" and self.order != "heads":
            raise ValueError("scales per head need order = heads")
        if self.scales == "block" and not self.hadamard_groups:
            raise ValueError("scales per block need hadamard_groups")
        if self.hadamard_groups and self.order == "heads":
            raise ValueError("hadamard_groups need order = contiguous")
        if self.hadamard_groups and ((self.low + self.high) % self.hadamard_groups or self.high % self.hadamard_groups):
            raise ValueError(
                f"hadamard_groups = {self.hadamard_groups} does not divide {self.low} + {self.high} columns"
            )
        if self.low + self.high == 0:
            raise ValueError("low and high are both 0")
        return self


class KVLayer(_Strict):
    """One layer's KV cache: ``high`` dims of a head at 8 bits and the others at ``low_bits`` (16: vLLM's own cache)."""

    low_bits: Literal[4, 8, 16] = 4
    high: int = Field(default=0, ge=0)


class QuantizationMetadata(_Strict):
    """The whole ``quantization_config``. ``recipe`` records how it was made; nothing at run time depends on it."""

    quant_method: Literal["resq"] = "resq"
    format_version: int = FORMAT_VERSION
    tool_version: str
    high_fraction: float = Field(ge=0, lt=1)
    head_dim: int = Field(gt=0)
    max_tp: int = Field(default=1, ge=1)
    sites: dict[SiteName, LinearSite]
    kv_cache: list[KVLayer]
    lm_head_bits: Literal[16] = 16
    ignore: list[str] = []
    recipe: dict[str, str | int | float | bool | None] = {}

    @model_validator(mode="after")
    def _complete(self) -> QuantizationMetadata:
        missing = [name for name in SITES if name not in self.sites]
        if missing:
            raise ValueError(f"sites lacks {', '.join(missing)}")
        return self

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str = "quantization_config") -> QuantizationMetadata:
        """Parse and check; ``source`` names the file in the message.

        Raises ResQError with one sentence: what field of what file, and the remedy.
        """
        method = config.get("quant_method")
        if method != QUANT_METHOD:
            raise ResQError(
                f"{source}: quant_method is {method!r}, not 'resq': this checkpoint was not quantized by resq"
            )
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise ResQError(
                f"{source}: format_version {version!r} is unknown to this release, which reads format "
                f"{FORMAT_VERSION}; install a resq-vllm that knows it, or quantize the model again with this one"
            )
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "quantization_config"
            raise ResQError(
                f"{source}: field {field} is invalid ({first['msg']}); quantize the model again with this release"
            ) from error
