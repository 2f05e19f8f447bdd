"""Requirement lines (PEP 508) as text: just enough to leave some of them out."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

_NAME = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def normalized(name: str) -> str:
    """A distribution's name in the form in which two spellings compare equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def distribution_name(requirement: str) -> str:
    """Normalized name of the distribution that a requirement line asks for.

    Raises:
        ValueError: when the line does not start with a name.
    """
    match = _NAME.match(requirement)
    if match is None:
        raise ValueError(f"{requirement!r} is not a requirement: it must start with a distribution's name.")
    return normalized(match.group(1))


def without_distributions(requirements: Iterable[str], names: Collection[str]) -> list[str]:
    """The requirement lines of the base install, less those for the given distributions.

    Lines that belong to an extra are left out too: the extra was not asked for.
    """
    dropped = {normalized(name) for name in names}
    return [
        line
        for line in requirements
        if distribution_name(line) not in dropped and not re.search(r";.*\bextra\s*==", line)
    ]
