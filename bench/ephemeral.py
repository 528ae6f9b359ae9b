"""What a TPM for a test costs: wall clock and processor time, beside a swtpm that is started for the test.

All contenders take turns, each once a round. swtpm is started with `--flags not-need-init,startup-clear` in a new
directory, connected to as soon as its socket is there, and ended by SIGTERM: the least that a test with swtpm can do.
Processor time is that of children that were waited for; of what the factory forks nobody is told.

Usage: python bench/ephemeral.py [--check] [--rounds N] [--swtpm FILE] [--help]
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from daemons import load_average
from figures import Summary, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crbd.testing.tpm import TpmFactory

GET_RANDOM = bytes.fromhex("80010000000c0000017b0008")
LIMITS = {"a TPM, made and ended": 60.0, "crbd run -- true": 400.0}
"""Highest p50 in milliseconds."""


def answered(path: Path) -> None:
    """Run a command on a socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(GET_RANDOM)
        if len(client.recv(4096)) != 20:
            raise SystemExit(f"{path}: a wrong answer")


def swtpm_for_a_test(program: str) -> None:
    """A swtpm from its start to its end."""
    place = Path(tempfile.mkdtemp())
    try:
        command = [program, "socket", "--tpm2", "--tpmstate", f"dir={place}", "--flags", "not-need-init,startup-clear"]
        command += ["--server", f"type=unixio,path={place}/tpm", "--ctrl", f"type=unixio,path={place}/ctrl"]
        with subprocess.Popen([*command, "--pid", f"file={place}/pid"], stderr=subprocess.DEVNULL) as process:
            while not (place / "pid").exists():
                time.sleep(0.0005)
            answered(place / "tpm")
            process.terminate()
    finally:
        shutil.rmtree(place)


def of_a_factory(factory: TpmFactory) -> None:
    """A TPM of crbd's, from its making to its end."""
    with factory.make() as tpm:
        answered(tpm.socket)


def crbd_run() -> None:
    """`crbd run` with the shortest of commands."""
    subprocess.run([sys.executable, "-m", "crbd", "run", "--", "true"], check=True)


def measured(contenders: dict[str, Callable[[], object]], rounds: int) -> list[list[str]]:
    """Rows of the table; milliseconds."""
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            before, begun = os.times(), time.perf_counter()
            run()
            wall[name].append((time.perf_counter() - begun) * 1e3)
            after = os.times()
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            processor[name].append(spent * 1e3)
    rows = []
    for name in contenders:
        figures, cpu = Summary.of(wall[name]), Summary.of(processor[name])
        rows.append([name, f"{figures.p50:.1f}", f"{figures.p90:.1f}", f"{min(wall[name]):.1f}", f"{cpu.p50:.0f}"])
        if figures.p50 > LIMITS.get(name, figures.p50):
            rows[-1].append(f"more than {LIMITS[name]:.0f}")
    return rows


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="status 1 where a limit is missed")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--swtpm", default="swtpm")
    options = parser.parse_args()
    os.chdir(Path(__file__).resolve().parent.parent)
    print(load_average())
    with TpmFactory() as factory, factory.make() as standing:
        snapshot = standing.snapshot()
        contenders: dict[str, Callable[[], object]] = {
            "a TPM, made and ended": lambda: of_a_factory(factory),
            "the same of a snapshot": lambda: factory.make(snapshot).close(),
            "swtpm, started and ended": lambda: swtpm_for_a_test(options.swtpm),
            "snapshot": standing.snapshot,
            "restore": lambda: standing.restore(snapshot),
            "reset": standing.reset,
            "crbd run -- true": crbd_run,
        }
        rows = measured(contenders, options.rounds)
    print(table(["what, in ms", "p50", "p90", "least", "CPU"], [row[:5] for row in rows]))
    print(load_average())
    missed = [row for row in rows if len(row) > 5]
    for row in missed:
        print(f"{row[0]}: {row[5]} ms")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
