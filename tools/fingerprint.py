"""What an environment was made from, and whether that is still what the sources ask for."""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

STAMP_NAME = "resq-setup.json"
# Everything that decides which packages are installed; lint settings in pyproject.toml are left out below.
ENVIRONMENT_FILES = (
    "tools/setup_env.py",
    "tools/requirements.py",
    "tools/vllm_cpu_shim.py",
    "tools/constraints-cpu.txt",
)
PROJECT_TABLES = ("build-system", "project")
EXTENSION_FILES = ("setup.py",)
EXTENSION_FOLDERS = ("csrc",)


@dataclass(frozen=True)
class Stamp:
    """Fingerprints (SHA-256, hex) of an environment and of the extension compiled in it, and where it stands."""

    environment: str
    extension: str
    place: str


def digest(parts: Iterable[tuple[str, bytes]]) -> str:
    """SHA-256 over named pieces; the order does not matter, names and lengths do."""
    total = hashlib.sha256()
    for name, data in sorted(parts):
        total.update(f"{name}\0{len(data)}\0".encode())
        total.update(data)
    return total.hexdigest()


def _project_tables(pyproject: Path) -> bytes:
    content = tomllib.loads(pyproject.read_text())
    tables = {name: content.get(name) for name in PROJECT_TABLES}
    tables["setuptools"] = content.get("tool", {}).get("setuptools")
    return json.dumps(tables, sort_keys=True).encode()


def environment_fingerprint(root: Path, variant: str) -> str:
    """Fingerprint of the installed packages: the pinned inputs under `root`, the interpreter, "cpu" or "cuda"."""
    parts = [(name, (root / name).read_bytes()) for name in ENVIRONMENT_FILES]
    parts.append(("pyproject", _project_tables(root / "pyproject.toml")))
    # Not the patch release: the environment keeps the interpreter that it was made with.
    interpreter = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]} {platform.machine()}"
    parts += [("interpreter", interpreter.encode()), ("variant", variant.encode())]
    return digest(parts)


def extension_fingerprint(root: Path) -> str:
    """Fingerprint of the sources of the compiled extension."""
    files = [root / name for name in EXTENSION_FILES]
    for folder in EXTENSION_FOLDERS:
        files += [path for path in (root / folder).rglob("*") if path.is_file()]
    return digest((path.relative_to(root).as_posix(), path.read_bytes()) for path in files if path.exists())


def current_stamp(root: Path, variant: str) -> Stamp:
    """The stamp that an up-to-date environment of `root` would carry."""
    return Stamp(environment_fingerprint(root, variant), extension_fingerprint(root), str(root / ".venv"))


def read_stamp(venv: Path) -> Stamp | None:
    """The stamp of an environment; None when it has none that can be read (then it is made up to date again)."""
    try:
        content = json.loads((venv / STAMP_NAME).read_text())
        return Stamp(**content)
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError, TypeError):
        return None


def write_stamp(venv: Path, stamp: Stamp) -> None:
    """Write the stamp in one step."""
    temporary = venv / f"{STAMP_NAME}.new"
    temporary.write_text(json.dumps(asdict(stamp), indent=1) + "\n")
    temporary.rename(venv / STAMP_NAME)
