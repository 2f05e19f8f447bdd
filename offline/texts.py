"""Where texts come from, for calibration and evaluation alike: .txt files, .jsonl files, data sets of the hub."""

from __future__ import annotations

import json
from pathlib import Path

from resq_vllm.errors import ResQError

HUB_ALIASES = {"wikitext2": "Salesforce/wikitext:wikitext-2-raw-v1"}


def read_text(path: Path) -> str:
    """A UTF-8 file whole; raises ResQError when it is missing, unreadable or of another encoding."""
    if not path.is_file():
        raise ResQError(f"{path}: no such file; give a .txt or .jsonl file, 'bundled', or a hub dataset owner/name")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ResQError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); convert the file") from error
    except OSError as error:
        raise ResQError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def read_json_lines(path: Path) -> list[str]:
    """The field "text" of every line that is not blank; raises ResQError naming file and line of a malformed one."""
    texts: list[str] = []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ResQError(f'{path}:{number}: not JSON ({error.msg}); write one {{"text": ...}} a line') from error
        text = entry.get("text") if isinstance(entry, dict) else None
        if not isinstance(text, str):
            raise ResQError(f'{path}:{number}: no string field "text"; write one {{"text": ...}} a line')
        texts.append(text)
    return texts


def hub_text(dataset: str, split: str) -> str:
    """Column "text" of a hub data set ``owner/name[:config]`` or an alias, rows joined by blank lines.

    That is the usual reading of Wikitext-2 (GPTQ and its successors). Raises ResQError when it cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ResQError(
            f"{dataset}: data sets of the hub need the package datasets; `pip install datasets`, or give a .txt or "
            ".jsonl file"
        ) from error
    name, _, config = HUB_ALIASES.get(dataset, dataset).partition(":")
    try:
        rows = load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub, its HTTP library and the dataset's builder share no base class
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ResQError(
            f"{dataset}: the dataset cannot be loaded ({type(error).__name__}: {reason}); "
            "check the name and the network, or give a .txt or .jsonl file"
        ) from error
    if "text" not in rows.column_names:
        raise ResQError(f'{dataset}: has no column "text"; write its text to a .txt or .jsonl file and give that')
    return "\n\n".join(rows["text"])
