"""The one exception that reaches a user: a sentence that names the thing and the remedy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError


class ResQError(ValueError):
    """Bad input, said in one sentence: what (file, field, tensor), why, and what to do about it."""


def invalid_field(error: ValidationError, whole: str) -> str:
    """ "FIELD is invalid (REASON)" of the first complaint; ``whole`` stands for the file where no field is named."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or whole
    return f"{field} is invalid ({first['msg']})"
