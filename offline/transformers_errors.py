"""What transformers raises for files that it cannot make a config, a tokenizer or a model of."""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError

# Its readers share no error class.
TRANSFORMERS_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, StrictDataclassError)


def reason(error: Exception) -> str:
    """An exception's text on one line, for the sentence of a ResQError."""
    return " ".join(str(error).split())[:300]
