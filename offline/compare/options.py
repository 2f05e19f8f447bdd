"""What a user chooses for ``resq compare``, checked once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from resq_vllm.errors import ResQError


class CompareOptions(BaseModel):
    """Everything that decides the figures of a comparison, but the methods' own settings.

    Attributes:
        model: folder or hub id.
        methods: names in the order wanted; empty = all.
        ablations: variations of ResQ to add, by name; "all" for all of them.
        dataset: what perplexity is measured on: bundled, wikitext2, FILE.txt or FILE.jsonl.
        texts: further texts by name, for a perplexity each.
        tasks: lm-eval tasks, sets of them, or task files.
        task_limit: documents a task, at most; None = all.
        calibration: what the methods are calibrated on: bundled, wikitext2, FILE.txt or FILE.jsonl, or self (what the
            model writes); None: the training side of ``dataset``, self where that is a file.
        nsamples: calibration sequences.
        seqlen: tokens a calibration sequence and an evaluation window, at most.
        windows: evaluation windows (or texts), at most; None = all.
        seed: of random rotations and calibration windows.
        train_tokens: calibration tokens that trained rotations see.
        learning_rate: first step size of trained rotations.
        high_fraction: share of the channels that ResQ keeps in 8 bits.
        kv_bits: of ResQ's KV cache, one for all layers or one a layer.
        trust_remote_code: let the tokenizer run code from the model's folder.

    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    methods: tuple[str, ...] = ()
    ablations: tuple[str, ...] = ()
    dataset: str = "bundled"
    texts: dict[str, str] = {}
    tasks: tuple[str, ...] = ()
    task_limit: int | None = Field(default=None, ge=1)
    calibration: str | None = None
    nsamples: int = Field(default=128, ge=1)
    seqlen: int = Field(default=2048, ge=8)
    windows: int | None = Field(default=None, ge=1)
    seed: int = 0
    train_tokens: int = Field(default=65_536, ge=1)
    learning_rate: float = Field(default=1.5, gt=0)
    high_fraction: float = Field(default=0.125, ge=0, le=0.5)
    kv_bits: tuple[Literal[4, 8, 16], ...] = (4,)
    trust_remote_code: bool = False

    @property
    def calibration_text(self) -> str:
        """``calibration`` or its default."""
        if self.calibration is not None:
            return self.calibration
        return "self" if self.dataset.endswith((".txt", ".jsonl")) else self.dataset

    @classmethod
    def checked(cls, **values: object) -> Self:
        """Build from command-line values; raises ResQError naming the flag and what it accepts."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            flag = "--" + str(first["loc"][0]).replace("_", "-")
            raise ResQError(f"{flag}: {first['msg']} (given: {first['input']!r})") from error


def default_folder(model: str) -> Path:
    """``compare-NAME`` in the working directory, NAME being the last part of the folder or hub id."""
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return Path(f"compare-{name}")


def parse_list(value: str) -> tuple[str, ...]:
    """The non-empty entries of a comma-separated list, each once, in order."""
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


def parse_texts(entries: Iterable[str]) -> dict[str, str]:
    """``NAME=FILE`` entries as a dict; raises ResQError for an entry of another form or a name given twice."""
    texts: dict[str, str] = {}
    for entry in entries:
        name, separator, file = entry.partition("=")
        if not (separator and name and file):
            raise ResQError(f"--text {entry}: not of the form NAME=FILE, such as de=deu.txt; name the text")
        if name in texts:
            raise ResQError(f"--text {entry}: the name {name} is given twice; give every text its own name")
        texts[name] = file
    return texts


def chosen_methods(wanted: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    """``wanted``, or all known ones when it is empty; raises ResQError listing the known ones for any other name."""
    names = tuple(known)
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ResQError(f"--methods: {', '.join(unknown)} unknown; the methods are {', '.join(names)}")
    return wanted or names
