"""The doors of ``benchmarks/fuzz.py``, with inputs that atheris changes towards branches not yet seen.

    pip install atheris          Python 3.11 to 3.13, on Linux
    python benchmarks/fuzz_guided.py --seconds 180          each door for so long, a process each

Every choice of a door is read from the bytes that atheris hands over, so that a change of a byte is a change
of one choice. The package is instrumented, torch is not. Findings are told apart by where they are raised, and
do not end the run; ``--door NAME --input HEX`` runs one again. Puts its part, "guided", into results/fuzz.json.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import random
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

try:
    atheris: Any = importlib.import_module("atheris")  # not a requirement, and its stubs lack what is used
except ImportError:
    sys.exit("fuzz_guided: atheris is not installed; pip install atheris, or use benchmarks/fuzz.py")

LONGEST = 256  # bytes of an input; a door reads some hundred at most


class Choices(random.Random):
    """A generator whose draws are the bytes of an input, and zeros after its end."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data, self._read = data, 0

    def getrandbits(self, k: int, /) -> int:
        count = (k + 7) // 8
        part = self._data[self._read : self._read + count]
        self._read += count
        return int.from_bytes(part, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def _instrumented_doors() -> Any:
    """The module of doors, with every module of the package instrumented before it."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    with atheris.instrument_imports(include=["optex"]):
        import optex

        for module in pkgutil.walk_packages(optex.__path__, "optex."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    return importlib.import_module("benchmarks.fuzz")


def explore(door: str, seconds: float, path: Path) -> None:
    """Fuzz one door until the time is up, and write what was found; ends the process, as libFuzzer would."""
    doors = _instrumented_doors()
    findings, until = doors.Findings(door), time.monotonic() + seconds

    def one(data: bytes) -> None:
        findings.knock(Choices(data), data.hex())
        if time.monotonic() > until:
            path.write_text(json.dumps(findings.as_dict()))
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-max_len={LONGEST}", "-seed=1", "-verbosity=0", "-timeout=60"], one)
    atheris.Fuzz()


def main() -> None:
    """Fuzz every door in a process of its own, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=180.0, help="for each door")
    parser.add_argument("--door")
    parser.add_argument("--input", help="hexadecimal: run this one alone, with --door")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)  # the process of a door
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        explore(options.door, options.seconds, options.write)
    doors = _instrumented_doors()
    if options.input is not None:
        print(doors.DOORS[options.door](Choices(bytes.fromhex(options.input))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for door in [options.door] if options.door else doors.DOORS:
            path = Path(folder, "found.json")
            subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--door", door, "--write", path], check=True
            )
            found[door] = json.loads(path.read_text())
            print(door, json.dumps(found[door], indent=1), flush=True)
    if not options.door:
        doors.note(guided={"atheris": version("atheris"), "seconds": options.seconds, "doors": found})


if __name__ == "__main__":
    main()
