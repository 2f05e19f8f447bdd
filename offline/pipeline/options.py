"""What a user chooses for ``resq quantize``: checked once, fingerprinted for --resume, recorded in the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resq_vllm.errors import ResQError
from resq_vllm.formats.metadata import LM_HEAD, LMHeadBits

OutputScales = Literal["token8", "part", "kv", "head"]
Method = Literal["resq", "lqer", "l2qer"]
_UNSERVED_BITS = (2, 3)
_RESQ_ONLY = (
    "high_fraction",
    "high_bits",
    "o_scales",
    "down_act_bits",
    "down_high_fraction",
    "down_groups",
    "compensate",
    "rtn",
)
_LQER_ONLY = ("rank", "weight_group")


class QuantizeOptions(BaseModel):
    """Everything that decides the bytes of a checkpoint, plus where it goes.

    ``o_scales``: what shares an activation scale at o_proj: "token8" = the whole input, at 8 bits; at 4 and 8 bits
    "part" = the input, "kv" = the query heads of a kv head, "head" = a head (the paper). docs/accuracy.md has figures.
    ``rank`` and ``weight_group`` are of lqer and l2qer alone; the high part, its scales and RTN of resq alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    output: Path
    method: Method = "resq"
    dataset: str = "bundled"
    nsamples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=8)
    batch_size: int = Field(default=4, ge=1)
    seed: int = 0
    device: str = "cpu"
    high_fraction: float = Field(default=0.125, ge=0, le=0.5)
    low_bits: Literal[4, 8] = 4
    high_bits: Literal[8] = 8
    kv_bits: tuple[Literal[4, 8, 16], ...] = (4,)
    lm_head_bits: LMHeadBits = 16
    o_scales: OutputScales = "part"
    down_act_bits: Literal[4, 8] | None = None
    down_high_fraction: float | None = Field(default=None, ge=0, le=0.5)
    down_groups: int = Field(default=8, ge=1)
    compensate: bool = True
    rtn: bool = False
    rank: int = Field(default=32, ge=0)
    weight_group: int = Field(default=128, ge=1)
    ignore_layers: tuple[str, ...] = ()
    max_tp: int = Field(default=8, ge=1)
    trust_remote_code: bool = False
    eval_windows: int = Field(default=16, ge=0)

    @classmethod
    def checked(cls, **values: object) -> QuantizeOptions:
        """Build from command-line values; raises ResQError naming the flag and what it accepts."""
        if values.get("low_bits") in _UNSERVED_BITS:
            raise ResQError(
                f"--low-bits {values['low_bits']}: no kernel serves {values['low_bits']}-bit weights; give 4 or 8, or "
                f"measure what it would cost with: resq compare MODEL --ablations low-{values['low_bits']}"
            )
        try:
            options = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            flag = "--" + str(first["loc"][0]).replace("_", "-")
            raise ResQError(f"{flag}: {first['msg']} (given: {first['input']!r})") from error
        head = options.lm_head_bits
        if head != 16 and LM_HEAD in options.ignore_layers:
            raise ResQError(f"--lm-head-bits {head} and --ignore-layers lm_head contradict each other; leave one out")
        resq = options.method == "resq"
        if head == 4 and not resq:
            raise ResQError(
                f"--lm-head-bits 4 belongs to --method resq, whose basis says which columns need 8; give 8 or 16 with "
                f"--method {options.method}"
            )
        for field in _LQER_ONLY if resq else _RESQ_ONLY:
            if getattr(options, field) != cls.model_fields[field].default:
                owner = "lqer and l2qer" if resq else "resq"
                raise ResQError(
                    f"--{field.replace('_', '-')} belongs to --method {owner}; leave it out with --method "
                    f"{options.method}"
                )
        return options

    def recipe(self) -> dict[str, str | int | float | bool | None]:
        """The part that the checkpoint's metadata records: how to make it again, without paths of this machine."""
        model = self.model if not Path(self.model).exists() else Path(self.model).resolve().name
        if self.method != "resq":
            factors: dict[str, str | int | float | bool | None] = {"rank": self.rank, "weight_group": self.weight_group}
            if self.method == "lqer":
                return {"model": model, "method": "LQER", **factors}
            factors |= {"dataset": Path(self.dataset).name, "nsamples": self.nsamples, "seqlen": self.seqlen}
            return {"model": model, "method": "L²QER", **factors, "seed": self.seed}
        return {
            "model": model,
            "method": "RTN" if self.rtn else "GPTQ",
            "dataset": Path(self.dataset).name,
            "nsamples": self.nsamples,
            "seqlen": self.seqlen,
            "seed": self.seed,
            "o_scales": self.o_scales if self.high_fraction else "part",
            "compensate": self.compensate and not self.rtn,
        }

    def deciding(self) -> dict[str, object]:
        """The options that decide the checkpoint's bytes, for the resume fingerprint."""
        return self.model_dump(mode="json", exclude={"output", "model", "dataset", "trust_remote_code"})


def parse_kv_bits(text: str) -> tuple[int, ...]:
    """ "4" for every layer, or one number a layer: "16,4,4,8". Raises ResQError for anything else."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ResQError(
            f"--kv-bits: {text!r} is neither 4, 8 or 16 nor a comma-separated list of them, one a layer"
        ) from error
