"""``resq report``: the page of every kind of checkpoint, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from offline.cli import main
from offline.report.stats import FILE_NAME
from offline.report.write import default_output, write_report
from tests.offline.pack.tiny_checkpoint import write_checkpoint
from tests.offline.report.conftest import Quantize

FIGURES = (
    *("spectrum-residual", "spectrum-value", "spectrum-key", "variance"),
    *("error-activation", "error-weight", "error-output", "error-kv"),
    *("bytes", "kv-bytes"),
)
VOID = frozenset({"meta", "img", "br", "hr", "link", "input"})


class Page(HTMLParser):
    """Parses strictly: every element is closed, in order; collects anchors, links, images and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split()).replace("\u00a0", " ")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        found = dict(attrs)
        self.ids += [value for value in [found.get("id")] if value]
        self.targets += [value for value in [found.get("href")] if value]
        self.sources += [value for value in [found.get("src")] if value]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def page_of(checkpoint: Path, folder: Path, compare: Path | None = None) -> Page:
    return Page(write_report(checkpoint, folder, compare).read_text())


def figures_of(page: Page) -> set[str]:
    return {name for name in page.ids if name in (*FIGURES, "comparison")}


def test_page_has_every_figure_inlined_and_beside_it(checkpoint: Path, tmp_path: Path) -> None:
    page = page_of(checkpoint, tmp_path / "out")
    assert figures_of(page) == set(FIGURES)
    assert len(page.sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == sorted([*(f"{name}.png" for name in FIGURES), "report.html"])


def test_page_needs_nothing_from_outside(checkpoint: Path, tmp_path: Path) -> None:
    html = write_report(checkpoint, tmp_path / "out").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(", re.sub(r"base64,[A-Za-z0-9+/=]+", "", html))
    assert "default-src 'none'" in html


def test_contents_lead_to_sections(checkpoint: Path, tmp_path: Path) -> None:
    page = page_of(checkpoint, tmp_path / "out")
    assert len(page.targets) == 6
    assert {target.removeprefix("#") for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_page_says_perplexities_and_serve_command(checkpoint: Path, tmp_path: Path) -> None:
    page = page_of(checkpoint, tmp_path / "out")
    stats = json.loads((checkpoint / FILE_NAME).read_text())
    assert f"{stats['perplexity_after']['value']:,.0f}" in page.text
    assert f"vllm serve {checkpoint}" in page.text
    assert "56 + 8" in page.text
    assert "8 × 64" not in page.text


def test_checkpoint_without_stats_says_to_quantize_again(checkpoint: Path, tmp_path: Path) -> None:
    older = Path(shutil.copytree(checkpoint, tmp_path / "older"))
    (older / FILE_NAME).unlink()
    page = page_of(older, tmp_path / "out")
    assert figures_of(page) == {name for name in FIGURES if not name.startswith("error")}
    assert page.text.count("Quantize the model again") == 3


def test_checkpoint_without_bases_or_anything_measured(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bare")
    page = page_of(tmp_path / "bare", tmp_path / "out")
    assert figures_of(page) == {"bytes", "kv-bytes"}
    assert "No bases lie beside this checkpoint" in page.text


@pytest.mark.parametrize("method", ["lqer", "l2qer"])
def test_checkpoint_of_another_method(method: str, quantize: Quantize, tmp_path: Path) -> None:
    page = page_of(quantize("--method", method, "--rank", "8"), tmp_path / "out")
    assert figures_of(page) == {"bytes", "kv-bytes"}
    assert "low-rank corrections" in page.text
    assert "The KV cache of this checkpoint is not quantized" in page.text


def test_eight_bit_lm_head(quantize: Quantize, tmp_path: Path) -> None:
    page = page_of(quantize("--rtn", "--lm-head-bits", "8"), tmp_path / "out")
    # 4096 rows of 64 bytes and a float32 scale, beside 128 bytes a row.
    assert "lm_head (8 bit) 272 KiB" in page.text
    assert "lm_head 64 8 8 a token and part" in page.text
    assert "embedding, norms" in page.text


def test_four_bit_lm_head(quantize: Quantize, tmp_path: Path) -> None:
    page = page_of(quantize("--rtn", "--lm-head-bits", "4"), tmp_path / "out")
    # 4096 rows of 56 half bytes, 8 whole ones and two float32 scales, beside 128 bytes a row.
    assert "lm_head (4.5 bit) 176 KiB" in page.text
    assert "lm_head 56 + 8 4 / 8 8 / 8 a token and part" in page.text
    assert "embedding, norms" in page.text


def test_uniform_checkpoint_rounded_to_nearest(quantize: Quantize, tmp_path: Path) -> None:
    page = page_of(quantize("--rtn", "--high-fraction", "0"), tmp_path / "out")
    assert figures_of(page) == set(FIGURES) - {"variance"}
    assert "rounded to nearest" in page.text


def test_ignored_sites_and_unpacked_cache_leave_gaps(quantize: Quantize, tmp_path: Path) -> None:
    flags = ["--kv-bits", "16,4,8", "--ignore-layers", "re:down_proj,model.layers.0", "--eval-windows", "0"]
    page = page_of(quantize(*flags), tmp_path / "out")
    assert figures_of(page) == set(FIGURES)
    assert "was not measured" in page.text


def test_comparison_adds_table_and_plot(checkpoint: Path, tmp_path: Path) -> None:
    bits = {"weight_bits": 4.5, "activation_bits": 4.5, "kv_bits": 4.5}
    rows = [{"method": "resq", "ppl": 7.1, **bits}, {"method": "rtn", "ppl": None, "seconds": 3, **bits}]
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({"model": "stories <3M>", "rows": rows, "date": "2026"}))
    page = page_of(checkpoint, tmp_path / "out", file)
    assert "comparison" in figures_of(page)
    assert "stories <3M>" in page.text
    assert "∞" in page.text


def test_names_are_escaped(checkpoint: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(checkpoint, tmp_path / "<b>&'odd' name"))
    html = write_report(odd, tmp_path / "out").read_text()
    assert "<b>&'odd'" not in html
    page = Page(html)
    assert "<b>&'odd' name" in page.text
    assert "vllm serve '" in page.text


def test_second_report_replaces_the_first(checkpoint: Path, quantize: Quantize, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (tmp_path / "out").mkdir()
    (folder / "notes.txt").write_text("mine")
    write_report(checkpoint, folder)
    first = (folder / "bytes.png").read_bytes()
    write_report(quantize("--low-bits", "8", "--kv-bits", "8"), folder)
    assert (folder / "bytes.png").read_bytes() != first
    assert (folder / "notes.txt").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_default_folder_stands_beside_the_checkpoint(tmp_path: Path) -> None:
    assert default_output(tmp_path / "demo") == tmp_path / "demo-report"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent"], "no such folder"),
        (["PLAIN"], "quantize the model first"),
        (["CHECKPOINT", "-o", "/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["CHECKPOINT", "--compare", "absent.json"], "--compare absent.json: cannot be read"),
        (["CHECKPOINT", "--compare", "BAD"], "rows.0.ppl is invalid"),
    ],
)
def test_refusals_are_one_sentence(
    arguments: list[str],
    words: str,
    checkpoint: Path,
    source_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"model": "m", "rows": [{"method": "x", "ppl": 0.5}]}')
    places = {"CHECKPOINT": str(checkpoint), "PLAIN": str(source_model), "BAD": str(bad)}
    given = [places.get(argument, argument) for argument in arguments]
    if "-o" not in given:
        given += ["-o", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["resq", "report", *given])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resq: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not (tmp_path / "out").exists()
