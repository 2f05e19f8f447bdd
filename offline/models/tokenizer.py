"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from offline.transformers_errors import TRANSFORMERS_ERRORS, reason
from resq_vllm.errors import ResQError


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer (transformers' base class or a subclass) of the model in ``folder``.

    ``trust_remote_code`` lets one that brings its own Python code run it. Raises ResQError when the folder has none
    that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except TRANSFORMERS_ERRORS as error:
        raise ResQError(
            f"{folder}: the tokenizer cannot be loaded ({reason(error)}); copy the model's tokenizer files there, and "
            "give --trust-remote-code if it brings code of its own that you trust"
        ) from error
