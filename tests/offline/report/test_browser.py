"""The page in headless Chromium: no console message, every image decoded, nothing wider than the window."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from offline.report.write import write_report

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs a chromium or google-chrome binary")

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
    *("--enable-logging=stderr", "--virtual-time-budget=5000"),
)
# Headless Chromium's own window is never narrower than 500 px: a frame is.
FRAME = """<!DOCTYPE html><html><body><iframe id="frame" width="{width}" height="900" src="page.html"></iframe>
<script>
addEventListener("load", () => {{
  const page = document.getElementById("frame").contentDocument;
  const images = [...page.images].map((image) => image.complete ? image.naturalWidth : 0);
  const root = page.documentElement;
  const sections = page.querySelectorAll("section").length;
  const result = {{images, width: root.clientWidth, needed: root.scrollWidth, sections}};
  document.body.innerHTML = "<pre>" + JSON.stringify(result) + "</pre>";
}});
</script></body></html>"""


def browse(page: Path, profile: Path, *flags: str) -> tuple[str, str]:
    """DOM after loading, and the console's lines."""
    command = [BROWSER, *FLAGS, *flags, f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_page_loads_without_a_console_message(checkpoint: Path, tmp_path: Path) -> None:
    page = write_report(checkpoint, tmp_path / "report")
    dom, console = browse(page, tmp_path / "profile")
    assert console == ""
    assert dom.count("<img ") == 10


def test_the_console_is_listened_to(tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!DOCTYPE html><html><body><script>console.error('seen')</script></body></html>")
    assert "seen" in browse(page, tmp_path / "profile")[1]


@pytest.mark.parametrize("width", [1280, 400])
def test_every_image_is_decoded_and_nothing_overflows(width: int, checkpoint: Path, tmp_path: Path) -> None:
    html = write_report(checkpoint, tmp_path / "report").read_text()
    (tmp_path / "page.html").write_text(html)
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width))
    # Files are origins of their own unless told otherwise; the frame must look into the page.
    dom, _ = browse(frame, tmp_path / "profile", "--allow-file-access-from-files", "--window-size=1400,1000")
    match = re.search(r"<pre>(.*)</pre>", dom)
    assert match is not None
    result = json.loads(match.group(1))
    assert result["sections"] == 6
    assert len(result["images"]) == 10
    assert min(result["images"]) > 500
    assert result["width"] == width
    assert result["needed"] <= width
