"""`python benchmarks/gpu_check_report.py SCRATCH OUT [STATUS]`: steps.json and logs.tar.gz of benchmarks/gpu_check.sh.

SCRATCH has gpu.txt, logs/NAME.log and steps.tsv: name, seconds, exit status or "-", result. Written after every step,
so that a run that is cut off leaves what it did; STATUS, the script's own, is known at the end. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import Any

# pytest's last line, such as "3 failed, 20 passed, 1 skipped in 4.20s".
PYTEST = re.compile(r"\b\d+ (?:passed|failed|skipped|errors?)\b.* in [\d.]+s")
COUNTED = {"passed": "passed", "failed": "failed", "error": "failed", "errors": "failed", "skipped": "skipped"}
# gpu_linear --check-only.
COMPARED = re.compile(r"(\d+) of (\d+) cases differ from the reference")


def counts(log: str) -> dict[str, int] | None:
    """Checks that passed, failed and were skipped, by the log of a step that counts them; else None."""
    for line in reversed(log.splitlines()):
        if PYTEST.search(line):
            found = {"passed": 0, "failed": 0, "skipped": 0}
            for number, word in re.findall(r"(\d+) (\w+)", line):
                if word in COUNTED:
                    found[COUNTED[word]] += int(number)
            return found
        compared = COMPARED.search(line)
        if compared:
            wrong, all_of_them = int(compared[1]), int(compared[2])
            return {"passed": all_of_them - wrong, "failed": wrong, "skipped": 0}
    return None


def steps(scratch: Path) -> list[dict[str, Any]]:
    """A row a step; "rc" is None for one that was not run."""
    rows = []
    for line in (scratch / "steps.tsv").read_text().splitlines():
        name, seconds, status, result = line.split("\t")
        log = scratch / "logs" / f"{name}.log"
        found = counts(log.read_text(errors="replace")) if log.exists() else None
        rc = None if status == "-" else int(status)
        rows.append(
            {"step": name, "seconds": int(seconds), "rc": rc, "result": result}
            | (found or dict.fromkeys(("passed", "failed", "skipped")))
        )
    return rows


def main(scratch: Path, out: Path, status: int | None) -> None:
    """Write both files, steps.json whole or not at all."""
    report = {
        "gpu": (scratch / "gpu.txt").read_text().strip(),
        "commit": os.environ.get("RESQ_COMMIT"),
        "exit_status": status,
        "steps": steps(scratch),
    }
    new = out / "steps.json.new"
    new.write_text(json.dumps(report, indent=2) + "\n")
    new.rename(out / "steps.json")
    with tarfile.open(out / "logs.tar.gz", "w:gz") as archive:
        archive.add(scratch / "logs", arcname="logs")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
