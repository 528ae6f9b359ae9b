"""A day in fast motion: random traffic and broken connections, and whether the daemon grows by it. See README.md.

Usage: python bench/soak.py [--exchanges N] [--seed N] [--json FILE] [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from daemons import CRBD, TPMS, Daemon, DidNotRunError, Programs, describe_machine, find_programs, unwind_at_sigterm
from figures import Trend
from traffic import Traffic, WrongAnswerError

SAMPLES = 400
"""How often the daemon is looked at in one run."""
RSS_GROWTH_LIMIT = 0.05
"""By which share resident memory may grow over the second half of the run."""
FILES_GROWTH_LIMIT = 0.5
"""By how many the open files may grow over the second half; a fitted line is never quite flat."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The daemon at one moment: answered exchanges so far, resident bytes, open file descriptors."""

    exchanges: int
    rss: int
    files: int


@dataclass(frozen=True, slots=True)
class Result:
    """What a run found: the samples, and the trends over their second half.

    `after_restart` says what was wrong when the daemon was started again; empty: nothing.
    """

    seed: int
    seconds: float
    exit_status: int
    after_restart: str
    samples: tuple[Sample, ...]
    rss: Trend
    files: Trend
    actions: dict[str, int]
    response_codes: dict[str, int]

    @property
    def complaints(self) -> list[str]:
        """What is not as it should be; empty when all is well."""
        found = []
        if self.rss.growth > RSS_GROWTH_LIMIT * self.rss.start:
            found.append(f"resident memory grew by {self.rss.growth / 1e6:.2f} MB over the second half")
        if self.files.growth > FILES_GROWTH_LIMIT:
            found.append(f"open files grew by {self.files.growth:.1f} over the second half")
        if self.exit_status != 0:
            found.append(f"the daemon ended with status {self.exit_status} at SIGTERM")
        if self.after_restart:
            found.append(f"after a restart: {self.after_restart}")
        return found


def run(options: argparse.Namespace, programs: Programs, scratch: Path) -> Result:
    """Run all the traffic, end the daemon, start it again, and see that nothing acknowledged is lost.

    Raises DidNotRunError, WrongAnswerError (with the last action) and OSError.
    """
    cpus = os.sched_getaffinity(0)
    home = scratch / options.subject
    begin = time.monotonic()
    with Daemon(options.subject, home, programs, cpus) as daemon:
        daemon.first_reply().close()
        traffic = Traffic(daemon, options.seed)
        traffic.open()
        samples = _soak(daemon, traffic, options.exchanges)
        traffic.close()
        status = daemon.stop()
    half = samples[len(samples) // 2 :]
    return Result(
        options.seed,
        time.monotonic() - begin,
        status,
        _restart(Daemon(options.subject, home, programs, cpus), traffic),
        tuple(samples),
        Trend.of([sample.rss for sample in half]),
        Trend.of([sample.files for sample in half]),
        dict(traffic.counts.most_common()),
        {f"{code:#x}": count for code, count in traffic.codes.most_common()},
    )


def _restart(daemon: Daemon, traffic: Traffic) -> str:
    with daemon:
        try:
            daemon.first_reply().close()
            traffic.follow(daemon)
            traffic.check_nv()
            traffic.close()
        except (DidNotRunError, WrongAnswerError, OSError) as error:
            return str(error)
    return ""


def _soak(daemon: Daemon, traffic: Traffic, exchanges: int) -> list[Sample]:
    samples: list[Sample] = []
    while traffic.exchanges < exchanges:
        try:
            traffic.step()
        except (WrongAnswerError, DidNotRunError, OSError) as error:
            place = f"after {traffic.exchanges} exchanges, in {traffic.action}"
            raise WrongAnswerError(f"{place}: {type(error).__name__}: {error}") from error
        if traffic.exchanges * SAMPLES >= exchanges * (len(samples) + 1):
            traffic.settle()
            samples.append(Sample(traffic.exchanges, daemon.memory().rss, daemon.open_files()))
            if sys.stderr.isatty():
                print(f"\r\033[K{traffic.exchanges} of {exchanges}", end="", file=sys.stderr, flush=True)
    return samples


def show(subject: str, result: Result) -> None:
    """Print what was found."""
    first, last = result.samples[0], result.samples[-1]
    middle = result.samples[len(result.samples) // 2]
    print(f"\n{subject}: {last.exchanges} exchanges in {result.seconds:.0f} s, {len(result.samples)} samples")
    print(
        f"resident memory in MB: {first.rss / 1e6:.2f} at first, {middle.rss / 1e6:.2f} half way, "
        f"{last.rss / 1e6:.2f} at last; trend of the second half {result.rss.growth / 1e6:+.3f} "
        f"({100 * result.rss.growth / result.rss.start:+.2f} %)"
    )
    print(
        f"open files: {first.files} at first, {middle.files} half way, {last.files} at last, "
        f"{max(sample.files for sample in result.samples)} at most; trend of the second half {result.files.growth:+.2f}"
    )
    print("actions: " + ", ".join(f"{name} {count}" for name, count in result.actions.items()))
    print("response codes: " + ", ".join(f"{code} {count}" for code, count in result.response_codes.items()))
    for complaint in result.complaints:
        print(f"Not well: {complaint}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--exchanges", type=int, default=200_000, help="answered commands and requests (%(default)s)")
    parser.add_argument("--seed", type=int, default=secrets.randbits(32), help="of the traffic (default: a new one)")
    parser.add_argument("--subject", choices=TPMS, default=CRBD, help="what to soak (default %(default)s)")
    parser.add_argument("--python", default=sys.executable, help="interpreter for crbd (default: this one)")
    parser.add_argument("--swtpm", default="swtpm", help="swtpm's program (default: the one on PATH)")
    parser.add_argument("--dir", default="/var/tmp", help="where the state lives meanwhile (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write samples and trends to FILE, too")
    options = parser.parse_args(arguments)
    if options.exchanges < SAMPLES:
        parser.error(f"--exchanges is at least {SAMPLES}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Soak and report. Returns the exit status."""
    options = parse(arguments)
    unwind_at_sigterm()
    print(f"seed: {options.seed}", flush=True)
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch:
            programs = find_programs(options.python, options.swtpm, False, Path(scratch))
            for name, value in describe_machine(programs, Path(scratch)).items():
                print(f"{name + ':':17}{value}", flush=True)
            result = run(options, programs, Path(scratch))
    except (DidNotRunError, WrongAnswerError, OSError) as error:
        print(f"soak: seed {options.seed}: {error}", file=sys.stderr)
        return 1
    show(options.subject, result)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    return 1 if result.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
