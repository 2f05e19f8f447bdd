"""Evaluation texts: the bundled held-out text, a .txt file, a .jsonl file of texts, or a data set of the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from offline.texts import HUB_ALIASES, hub_text, read_json_lines, read_text
from resq_vllm.errors import ResQError

BUNDLED_TEXT = Path(__file__).resolve().parent.parent / "bundled" / "heldout.txt"
Protocol = Literal["windows", "texts"]


@dataclass(frozen=True)
class Dataset:
    """Texts and how they are scored.

    ``windows``: one long text, cut into windows of equal length; ``texts``: independent texts, one sequence each.
    """

    name: str
    protocol: Protocol
    texts: tuple[str, ...]


def load_dataset(name: str) -> Dataset:
    """Load "bundled", FILE.txt, FILE.jsonl (one {"text": ...} a line), "wikitext2" or a hub data set (test split).

    Raises ResQError with the remedy when there is no such data set, or nothing in it.
    """
    if name == "bundled":
        dataset = Dataset("bundled held-out text", "windows", (read_text(BUNDLED_TEXT),))
    elif name.endswith(".jsonl"):
        texts = tuple(text for text in read_json_lines(Path(name)) if text.strip())
        dataset = Dataset(Path(name).name, "texts", texts)
    elif name.endswith(".txt"):
        dataset = Dataset(Path(name).name, "windows", (read_text(Path(name)),))
    elif name in HUB_ALIASES or "/" in name:
        dataset = Dataset(f"{name} test", "windows", (hub_text(name, "test"),))
    else:
        raise ResQError(f"the data set {name!r} is unknown; give bundled, wikitext2, a .txt file or a .jsonl file")
    if not any(text.strip() for text in dataset.texts):
        raise ResQError(f"{name}: holds no text; give a data set with text in it")
    return dataset
