"""Options of a comparison, and what is refused."""

from __future__ import annotations

import pytest

from offline.compare.options import CompareOptions, chosen_methods, parse_list, parse_texts
from resq_vllm.errors import ResQError


def test_lists_drop_blanks_and_repeats() -> None:
    assert parse_list(" rtn, resq,,rtn ") == ("rtn", "resq")
    assert parse_list("") == ()


def test_texts_by_name() -> None:
    assert parse_texts(["de=deu.txt", "x=a=b.txt"]) == {"de": "deu.txt", "x": "a=b.txt"}


@pytest.mark.parametrize("entry", ["deu.txt", "=deu.txt", "de="])
def test_text_without_a_name_or_a_file_is_refused(entry: str) -> None:
    with pytest.raises(ResQError, match="NAME=FILE"):
        parse_texts([entry])


def test_text_name_given_twice_is_refused() -> None:
    with pytest.raises(ResQError, match="given twice"):
        parse_texts(["de=a.txt", "de=b.txt"])


def test_no_methods_means_all() -> None:
    assert chosen_methods((), ["a", "b"]) == ("a", "b")


def test_unknown_methods_are_all_named() -> None:
    with pytest.raises(ResQError, match="--methods: x, y unknown; the methods are a, b"):
        chosen_methods(("x", "a", "y"), ["a", "b"])


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"nsamples": 0}, "--nsamples"),
        ({"seqlen": 4}, "--seqlen"),
        ({"windows": 0}, "--windows"),
        ({"high_fraction": 0.75}, "--high-fraction"),
        ({"train_tokens": 0}, "--train-tokens"),
        ({"task_limit": 0}, "--task-limit"),
    ],
)
def test_out_of_range_names_the_flag(values: dict[str, object], flag: str) -> None:
    with pytest.raises(ResQError, match=flag):
        CompareOptions.checked(model="m", **values)
