"""Lines of the package that the test suite runs, room by room.

    make coverage       runs the suite under coverage.py, worker processes and command lines included, then this

Reads the combined data of coverage.py in the working folder; writes results/coverage.json and the table of
results/README.md. Exits with 1 where less than ``LEAST`` of the lines are run.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from optex.studies.tables import fill, markdown_table

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "results" / "coverage.json"
LEAST = 0.95


def measured() -> dict[str, Any]:
    """Statements of every room and how many of them were run, from coverage.py's own report."""
    told = subprocess.run(
        [sys.executable, "-m", "coverage", "json", "-q", "-o", "-"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    lines: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, file in json.loads(told.stdout)["files"].items():
        parts = Path(name).parts
        room = f"{parts[1]}/" if len(parts) > 2 else "front door and ground floor"
        lines[room][0] += file["summary"]["num_statements"]
        lines[room][1] += file["summary"]["covered_lines"]
    total = [sum(counts) for counts in zip(*lines.values(), strict=True)]
    return {
        "tools": {name: version(name) for name in ("coverage", "torch")}
        | {"python": platform.python_version()},
        "rooms": {room: {"lines": counts[0], "run": counts[1]} for room, counts in sorted(lines.items())},
        "lines": total[0],
        "run": total[1],
        "share": round(total[1] / total[0], 4),
    }


def report(record: dict[str, Any]) -> str:
    """The table, rooms with the smallest share first."""
    rooms = sorted(record["rooms"].items(), key=lambda item: item[1]["run"] / item[1]["lines"])
    counted = [(room, each["lines"], each["run"]) for room, each in rooms] + [
        ("all", record["lines"], record["run"])
    ]
    rows = [(room, f"{lines:,}", f"{100 * run / lines:.1f} %") for room, lines, run in counted]
    return markdown_table(("room", "lines", "run"), rows)


def main() -> int:
    """Read, write, judge."""
    record = measured()
    RECORD.write_text(json.dumps(record, indent=1) + "\n")
    fill(ROOT / "results" / "README.md", {"coverage": report(record)})
    print(f"{record['share']:.2%} of {record['lines']} lines; at least {LEAST:.0%} is asked")
    return int(record["share"] < LEAST)


if __name__ == "__main__":
    sys.exit(main())
