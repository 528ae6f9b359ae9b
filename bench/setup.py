"""What making a TPM takes: crbd's swtpm_setup beside swtpm's, by turns, each with a fresh directory every time.

The authority is made before, one for each; the keys of TPMs are RSA-2048 and ECC P-384, and how long the search for
primes takes is chance: many rounds, medians. Processes are started as libvirt starts them, and measured from exec to
their end. crbd's is the launcher's command (crbd.compat.launch) without the shell script before it.

Usage: python bench/setup.py [--check] [--rounds N] [--dir DIR] [--swtpm-setup FILE] [--python FILE] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from daemons import load_average
from figures import Summary, table

LIMIT = 1.5
"""Highest p50 of crbd's --create-ek-cert as a multiple of swtpm's."""
CHECKED = "--create-ek-cert"
TASKS = {
    CHECKED: ("--create-ek-cert",),
    "all that libvirt asks for": ("--createek", "--create-ek-cert", "--create-platform-cert", "--lock-nvram"),
    "--reconfigure": ("--reconfigure", "--pcr-banks", "sha256,sha384"),
    "--not-overwrite": ("--not-overwrite",),
    "--print-capabilities": ("--print-capabilities",),
}
"""By name: the options. The last three find the TPM that the one before left."""
TIMEOUT = 120.0
"""Seconds for one TPM."""


class DidNotRunError(Exception):
    """A program failed. The text is one line."""


@dataclass(slots=True)
class Contender:
    """One of the programs, with a configuration and an authority of its own; `times` are seconds by task."""

    name: str
    command: tuple[str, ...]
    home: Path
    times: dict[str, list[float]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Configuration files as the program itself makes them, and the authority at its first use."""
        self.home.mkdir()
        self._run(("--create-config-files", "root" if os.getuid() == 0 else "skip-if-exist"))
        self.make(CHECKED, counted=False)

    def make(self, task: str, *, counted: bool = True) -> None:
        """Do one task."""
        state = self.home / "state"
        if "--create-ek-cert" in TASKS[task]:
            state.mkdir(exist_ok=True)
            for path in state.iterdir():
                path.unlink()
        arguments = ("--tpm2", "--tpmstate", str(state), *TASKS[task])
        begin = time.perf_counter()
        self._run(arguments)
        if counted:
            self.times.setdefault(task, []).append(time.perf_counter() - begin)

    def _run(self, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "XDG_CONFIG_HOME": str(self.home), "PYTHONPATH": str(Path(__file__).parent.parent)}
        done = subprocess.run(
            [*self.command, *arguments], check=False, capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
        if done.returncode:
            raise DidNotRunError(f"{self.name} {' '.join(arguments)}: {(done.stderr or done.stdout).strip()[-300:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; returns 0, or 1 where something did not run or `--check` found the limit missed."""
    options = _parse(arguments)
    print(f"load {load_average()}", file=sys.stderr)
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as directory:
            theirs = Contender("swtpm", (options.swtpm_setup,), Path(directory, "swtpm"))
            launch = (options.python, "-m", "crbd.compat.launch", "swtpm_setup")
            ours = Contender("crbd", launch, Path(directory, "crbd"))
            _measure((theirs, ours), options.rounds)
    except (DidNotRunError, OSError, subprocess.TimeoutExpired) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"load {load_average()}", file=sys.stderr)
    print(_report(theirs, ours))
    ratio = _ratio(theirs, ours, CHECKED)
    if options.json is not None:
        figures = {
            contender.name: {task: asdict(Summary.of(times)) for task, times in contender.times.items()}
            for contender in (theirs, ours)
        }
        options.json.write_text(json.dumps(figures, indent=2))
    if options.check and ratio > LIMIT:
        print(f"{CHECKED} takes {ratio:.2f} times swtpm's time; the limit is {LIMIT}", file=sys.stderr)
        return 1
    return 0


def _measure(contenders: Sequence[Contender], rounds: int) -> None:
    for contender in contenders:
        contender.prepare()
    for _ in range(rounds):
        for task in TASKS:
            for contender in random.sample(contenders, len(contenders)):
                contender.make(task)


def _ratio(theirs: Contender, ours: Contender, task: str) -> float:
    return Summary.of(ours.times[task]).p50 / Summary.of(theirs.times[task]).p50


def _report(theirs: Contender, ours: Contender) -> str:
    rows = []
    for task in TASKS:
        cells = [task]
        for contender in (theirs, ours):
            found = Summary.of(contender.times[task]).scaled(1000)
            cells += [f"{found.p50:.0f}", f"{found.p90:.0f}"]
        rows.append([*cells, f"{_ratio(theirs, ours, task):.2f}"])
    return table(("swtpm_setup, ms", "swtpm p50", "p90", "crbd p50", "p90", "ratio"), rows)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help=f"fail where crbd takes more than {LIMIT} times as long")
    parser.add_argument("--rounds", type=int, default=15, help="TPMs each program makes, per task (default: 15)")
    parser.add_argument("--dir", default="/var/tmp", help="where to work (default: /var/tmp)")
    parser.add_argument("--swtpm-setup", default="/usr/bin/swtpm_setup", help="swtpm's swtpm_setup")
    parser.add_argument("--python", default=sys.executable, help="interpreter that runs crbd")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
