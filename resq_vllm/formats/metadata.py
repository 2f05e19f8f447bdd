"""``quantization_config`` of a ResQ checkpoint's config.json: everything that kernels must know, and nothing assumed.

Per linear site the metadata says how many input columns are low and high, the bits of weights and activations, which
columns share an activation or a weight scale and how the online Hadamard is cut; per layer how K and V are kept. Format
2 adds ``scale_groups``, ``weight_group`` and ``low_rank``; a format 1 file is read as before. Format 3 adds
``lm_head_bits`` = 8 and format 4 ``lm_head_bits`` = 4; only files that have them say so, since a release that cannot
serve these must refuse them, and them alone.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resq_vllm.errors import ResQError, invalid_field

FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2, 3, 4)
_FORMAT_2_FIELDS = ("scale_groups", "weight_group", "low_rank")
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
    block    as ``part``, per scale block: one of ``scale_groups`` equal stretches of
             columns, each [low | high] or of whole heads (the paper's down_proj
             has one block)
    =======  =====================================================================

    ``order``: "contiguous" = [all low | all high]; "heads" = every head is [low | high]. ``low`` and ``high`` count the
    input columns of the whole layer over all ranks. ``hadamard_groups``: equal blocks of the online Hadamard over the
    whole input, 0 = none. ``scale_groups``: scale blocks, 0 = one a Hadamard block. ``weight_group``: columns of the
    low part that share a weight scale, in the part's order; 0 = one scale an output channel. ``low_rank``: k of the
    correction y += (x·A)·B with the unquantized x (arXiv 2402.02446), 0 = none.
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
    scale_groups: int = Field(default=0, ge=0)
    weight_group: int = Field(default=0, ge=0)
    low_rank: int = Field(default=0, ge=0)

    @property
    def weight_bits(self) -> float:
        """Mean bits of a weight's code, without scales and correction."""
        return (self.low * self.weight_low_bits + self.high * self.weight_high_bits) / (self.low + self.high)

    @property
    def scale_blocks(self) -> int:
        """Scale blocks of scales = block, over all ranks."""
        return self.scale_groups or self.hadamard_groups

    @property
    def weight_groups(self) -> int:
        """Weight scales of an output channel's low part, over all ranks: 1 without ``weight_group``."""
        return self.low // self.weight_group if self.weight_group else 1

    @model_validator(mode="after")
    def _consistent(self) -> LinearSite:
        if self.scales == "head" and self.order != "heads":
            raise ValueError("scales per head need order = heads")
        if self.scales == "block" and not self.scale_blocks:
            raise ValueError("scales per block need hadamard_groups or scale_groups")
        if self.hadamard_groups and self.order == "heads":
            raise ValueError("hadamard_groups need order = contiguous")
        # Scale blocks of their own need not give every Hadamard block high columns.
        cut = 0 if self.scale_groups else self.high
        if self.hadamard_groups and ((self.low + self.high) % self.hadamard_groups or cut % self.hadamard_groups):
            raise ValueError(
                f"hadamard_groups = {self.hadamard_groups} does not divide {self.low} + {self.high} columns"
            )
        if self.low + self.high == 0:
            raise ValueError("low and high are both 0")
        self._check_scale_groups()
        if self.weight_group and (not self.low or self.low % self.weight_group):
            raise ValueError(f"weight_group = {self.weight_group} does not divide {self.low} low columns")
        return self

    def _check_scale_groups(self) -> None:
        groups = self.scale_groups
        if not groups:
            return
        if self.scales != "block":
            raise ValueError("scale_groups need scales = block")
        if self.low % groups or self.high % groups:
            raise ValueError(f"scale_groups = {groups} does not divide {self.low} + {self.high} columns")
        if self.hadamard_groups % groups:
            raise ValueError(f"hadamard_groups = {self.hadamard_groups} is no multiple of scale_groups = {groups}")
        if self.hadamard_groups and (self.high // groups) % ((self.low + self.high) // self.hadamard_groups):
            raise ValueError(
                f"a Hadamard block of {(self.low + self.high) // self.hadamard_groups} columns straddles the boundary "
                f"of a scale block's {self.low // groups} low and {self.high // groups} high columns"
            )


class KVLayer(_Strict):
    """One layer's KV cache: ``high`` dims of a head at 8 bits and the others at ``low_bits`` (16: vLLM's own cache)."""

    low_bits: Literal[4, 8, 16] = 4
    high: int = Field(default=0, ge=0)


LMHeadBits = Literal[4, 8, 16]
LM_HEAD = "lm_head"
_LM_HEAD_VERSIONS: dict[LMHeadBits, int] = {16: FORMAT_VERSION, 8: 3, 4: 4}


def head_site(bits: LMHeadBits, columns: int, high: int) -> LinearSite | None:
    """lm_head as a linear layer of ``columns`` inputs, or None where it is not quantized.

    8: high columns alone. 4: the last ``high`` columns at 8 bits, where the residual stream's basis has put the most
    variance, the others at 4; inputs at 8 bits in both parts, since 4 cost another 0.9 to 1.2 % of perplexity.
    """
    if bits == 16:
        return None
    if bits == 8:
        return LinearSite(low=0, high=columns)
    return LinearSite(low=columns - high, high=high, act_low_bits=8)


def format_version(lm_head_bits: LMHeadBits) -> int:
    """The format to write: that of this release, or the one that a quantized lm_head needs."""
    return _LM_HEAD_VERSIONS[lm_head_bits]


class QuantizationMetadata(_Strict):
    """The whole ``quantization_config``. ``recipe`` records how it was made; nothing at run time depends on it.

    ``lm_head_bits``: 16 = lm_head in the model's dtype; 8 = its weights symmetric with a scale a row, its input
    asymmetric with a scale a token, both of 8 bits; 4 = low columns at 4 bits beside the residual stream's high ones,
    scales a row and part, the input as before with a scale a token and part (``lm_head_site``).
    """

    quant_method: Literal["resq"] = "resq"
    format_version: int = FORMAT_VERSION
    tool_version: str
    high_fraction: float = Field(ge=0, lt=1)
    head_dim: int = Field(gt=0)
    max_tp: int = Field(default=1, ge=1)
    sites: dict[SiteName, LinearSite]
    kv_cache: list[KVLayer]
    lm_head_bits: LMHeadBits = 16
    ignore: list[str] = []
    recipe: dict[str, str | int | float | bool | None] = {}

    @model_validator(mode="after")
    def _complete(self) -> QuantizationMetadata:
        missing = [name for name in SITES if name not in self.sites]
        if missing:
            raise ValueError(f"sites lacks {', '.join(missing)}")
        if self.format_version < FORMAT_VERSION:
            for name, site in self.sites.items():
                newer = [field for field in _FORMAT_2_FIELDS if getattr(site, field)]
                if newer:
                    raise ValueError(f"sites.{name}.{newer[0]} is of format 2, not {self.format_version}")
        if self.lm_head_bits != 16:
            needed = format_version(self.lm_head_bits)
            if self.format_version < needed:
                raise ValueError(f"lm_head_bits = {self.lm_head_bits} is of format {needed}, not {self.format_version}")
            if LM_HEAD in self.ignore:
                raise ValueError(f"lm_head is in the ignore list although lm_head_bits is {self.lm_head_bits}")
        return self

    @property
    def lm_head_site(self) -> LinearSite | None:
        """lm_head as a linear layer of the residual stream's width, or None where it is not quantized."""
        qkv = self.sites["qkv"]
        return head_site(self.lm_head_bits, qkv.low + qkv.high, qkv.high)

    @property
    def lm_head_weight_bits(self) -> float:
        """Mean bits of a weight of lm_head, without scales: 16 where it is not quantized."""
        site = self.lm_head_site
        return 16.0 if site is None else site.weight_bits

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
        if version not in READABLE_VERSIONS:
            raise ResQError(
                f"{source}: format_version {version!r} is unknown to this release, which reads formats "
                f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}; install a resq-vllm that knows it, or quantize "
                "the model again with this one"
            )
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            problem = invalid_field(error, "quantization_config")
            raise ResQError(f"{source}: field {problem}; quantize the model again with this release") from error
