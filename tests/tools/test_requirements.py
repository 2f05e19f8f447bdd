"""Requirement lines with some distributions left out."""

from __future__ import annotations

import pytest

from tools.requirements import distribution_name, without_distributions


def test_leaves_out_by_normalized_name_and_keeps_versions_and_markers() -> None:
    lines = [
        "Torch_Vision",
        "torch==2.13.0+cpu; platform_machine == 'x86_64'",
        "torchaudio; sys_platform != 'x'",
        "numpy",
    ]
    kept = without_distributions(lines, ["torch-vision", "torchaudio"])
    assert kept == ["torch==2.13.0+cpu; platform_machine == 'x86_64'", "numpy"]


def test_lines_of_extras_are_left_out() -> None:
    lines = ['pandas; extra == "bench"', "fastapi[standard]>=0.133", 'zen; python_version > "3" and extra=="zen"']
    assert without_distributions(lines, []) == ["fastapi[standard]>=0.133"]


@pytest.mark.parametrize(
    ("line", "name"), [("torch==2.13.0+cpu", "torch"), ("fastapi[standard]<1", "fastapi"), ("A.b_C>=1", "a-b-c")]
)
def test_distribution_name(line: str, name: str) -> None:
    assert distribution_name(line) == name


def test_line_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match="'>=1' is not a requirement"):
        distribution_name(">=1")
