"""Evaluation texts: the bundled held-out text, Wikitext-2, a .txt file or a .jsonl file of texts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    """Load "bundled", "wikitext2" (raw test split from the Hugging Face hub), FILE.txt or FILE.jsonl.

    A .jsonl file holds one object {"text": …} a line. Raises ResQError with the remedy when there is no such data set,
    or nothing in it.
    """
    if name == "bundled":
        return Dataset("bundled held-out text", "windows", (_read(BUNDLED_TEXT),))
    if name == "wikitext2":
        return Dataset("wikitext-2-raw test", "windows", (_wikitext2(),))
    path = Path(name)
    if path.suffix == ".txt":
        return Dataset(path.name, "windows", (_read(path),))
    if path.suffix == ".jsonl":
        return Dataset(path.name, "texts", _json_lines(path))
    raise ResQError(f"the data set {name!r} is unknown; give bundled, wikitext2, a .txt file or a .jsonl file")


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ResQError(f"cannot read the data set {path} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ResQError(f"{path} is not UTF-8 text (byte {error.start}); convert it to UTF-8") from error
    if not text.strip():
        raise ResQError(f"{path} holds no text; give a file with some")
    return text


def _json_lines(path: Path) -> tuple[str, ...]:
    texts: list[str] = []
    for number, line in enumerate(_read(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ResQError(f"{path} line {number} is not valid JSON ({error}); mend or remove the line") from error
        text = record.get("text") if isinstance(record, dict) else None
        if not isinstance(text, str) or not text:
            raise ResQError(f'{path} line {number} lacks the field "text"; write every line as {{"text": "…"}}')
        texts.append(text)
    return tuple(texts)


def _wikitext2() -> str:
    """The 4358 rows of the test split joined by blank lines, as in the perplexity tables of GPTQ and its successors."""
    try:
        from datasets import load_dataset as hub_dataset
    except ImportError as error:
        raise ResQError("wikitext2 needs the package datasets; install it, or give a .txt file") from error
    try:
        rows = hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"]
    # Without a network the hub client raises a ConnectionError or a FileNotFoundError, both OSErrors.
    except (OSError, ValueError) as error:
        raise ResQError(
            "cannot download Wikitext-2 from the Hugging Face hub; connect to it, or give the text as a .txt file"
        ) from error
    return "\n\n".join(rows)
