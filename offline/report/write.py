"""``resq report``: gathers, draws, and writes the page and its figures, whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from offline.report.data import gather
from offline.report.page import build_sections, render
from offline.report.plots.style import png
from resq_vllm.errors import ResQError

PAGE = "report.html"


def default_output(directory: Path) -> Path:
    """``DIR-report`` beside the checkpoint."""
    path = Path(os.path.abspath(directory))
    return path.with_name(path.name + "-report")


def write_report(directory: Path, output: Path | None = None, compare: Path | None = None) -> Path:
    """Write ``report.html`` and its PNGs to the folder ``output``, and return the page's path.

    An existing folder is used; files of an earlier report in it are replaced. Raises ResQError for what is no ResQ
    checkpoint, and for a folder that cannot be written.
    """
    data = gather(directory, compare)
    parts = build_sections(data)
    images = {plot.name: png(plot.figure) for part in parts for plot in part.plots}
    files = {f"{name}.png": image for name, image in images.items()}
    files[PAGE] = render(data, parts, images).encode()
    folder = default_output(directory) if output is None else output
    write_files(folder, files)
    return folder / PAGE


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places first, then move each there."""
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        for name in files:
            os.replace(temporary / name, folder / name)
    except OSError as error:
        raise ResQError(f"cannot write to {folder} ({error.strerror}); give another folder with -o") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
