"""The one exception that reaches a user: a sentence that names the thing and the remedy."""


class ResQError(ValueError):
    """Bad input, said in one sentence: what (file, field, tensor), why, and what to do about it."""
