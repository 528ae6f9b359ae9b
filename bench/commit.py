"""What a durable commit costs: the two-slot file beside bare system calls and the other stores.

All of them write the same number of bytes, one commit each in turn and in another order every time, to files whose
blocks are there already. The bare calls are the floor: `pwrite` and `fdatasync` in two places by turns. The two-slot
file is given bytes and their SHA-256, as the document's encoder gives them; a second table has all of it: the document
made around a state of that size, hashed and stored. Do not compare microseconds of two runs, compare ratios: on a
shared machine a sync takes 0.2 ms now and 4 ms a second later.

Usage: python bench/commit.py [--check] [--rounds N] [--commits N] [--dir DIR] [--json FILE] [--help]
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

from daemons import load_average
from figures import Summary, percentile, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.store.directory import open_directory
from crbd.store.layout import open_state
from crbd.store.linear import open_linear
from crbd.store.slots import SlotFile

BARE = "pwrite, fdatasync"
REPLACE = "write, fsync, rename, fsync"
SLOTS = "crbd two-slot file"
DOCUMENT = "crbd document, made and stored"
DIRECTORY = "crbd directory"
LINEAR = "crbd linear file"

LIMIT = 1.3
"""Highest p50 of the two-slot file as a multiple of the bare calls with the same bytes."""

SIZES = (1_300, 11_000, 150_000)
"""Bytes: permanent state of a new TPM, with volatile state, and a TPM with full NV memory."""

GROWING = 4
"""Commits of each size before any is counted: files grow to it."""

Commit = Callable[[bytes, bytes], object]


@dataclass(slots=True)
class Contender:
    """One way to make bytes durable; `batches` are times in ns by size, one list a round."""

    name: str
    commit: Commit
    """Makes bytes durable; their SHA-256 goes with them, and is known before the clock runs."""
    batches: dict[int, list[list[int]]] = field(default_factory=dict)

    def run(self, size: int) -> int:
        """One commit of bytes that are new every time; ns."""
        data = random.randbytes(size)
        digest = hashlib.sha256(data).digest()
        begin = time.perf_counter_ns()
        self.commit(data, digest)
        return time.perf_counter_ns() - begin


@dataclass(frozen=True, slots=True)
class Line:
    """One row: times in microseconds; `ratios` are p50 to the bare calls' p50 of the round: median, quartiles."""

    size: int
    subject: str
    times: Summary
    ratios: tuple[float, float, float]


def bare(place: Path, running: ExitStack) -> Commit:
    """Two places in turn in a file whose blocks are all there: the least a durable write can cost."""
    stride = max(SIZES) + 4096 - max(SIZES) % 4096
    descriptor = os.open(place, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    running.callback(os.close, descriptor)
    os.pwrite(descriptor, bytes(2 * stride), 0)
    os.fsync(descriptor)
    turn = 0

    def commit(data: bytes, digest: bytes) -> None:
        nonlocal turn
        os.pwrite(descriptor, data, turn * stride)
        os.fdatasync(descriptor)
        turn = 1 - turn

    return commit


def replace(place: Path, running: ExitStack) -> Commit:
    """A new file for every commit, put in the old one's place."""
    place.mkdir()
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    running.callback(os.close, directory)

    def commit(data: bytes, digest: bytes) -> None:
        descriptor = os.open(place / "new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.write(descriptor, data)
        os.fsync(descriptor)
        os.close(descriptor)
        (place / "new").replace(place / "state")
        os.fsync(directory)

    return commit


def contenders(scratch: Path, running: ExitStack) -> list[Contender]:
    """All of them, each with a place of its own below `scratch`."""
    slots = SlotFile.open(scratch / "slots", create=True)
    directory = open_directory(scratch / "directory", create=True)
    linear = open_linear(scratch / "linear", create=True)
    for store in (slots, directory, linear):
        running.callback(store.close)
    return [
        Contender(BARE, bare(scratch / "bare", running)),
        Contender(SLOTS, slots.commit),
        Contender(REPLACE, replace(scratch / "replace", running)),
        Contender(DIRECTORY, lambda data, _: directory.commit({StateKind.PERMANENT: data})),
        Contender(LINEAR, lambda data, _: linear.commit({StateKind.PERMANENT: data})),
    ]


def whole_commits(scratch: Path, running: ExitStack) -> list[Contender]:
    """The bare calls, and what a daemon does: apart from the others, whose caches it would empty."""
    document = open_state(scratch / "document", create=True)
    document.use_engine(EngineStamp(0, 9, 2))
    running.callback(document.close)
    return [
        Contender(BARE, bare(scratch / "bare beside", running)),
        Contender(DOCUMENT, lambda data, _: document.commit({StateKind.PERMANENT: data})),
    ]


def measure(make: Callable[[Path, ExitStack], list[Contender]], scratch: Path, rounds: int, count: int) -> list[Line]:
    """One commit of each in turn, each time in another order: a disk's speed jumps by a factor of ten within a second.

    A round is `count` commits of each.
    """
    with ExitStack() as running:
        subjects = make(scratch, running)
        gc.disable()
        try:
            for size in SIZES:
                for subject in subjects:
                    for _ in range(GROWING):
                        subject.run(size)
                for _ in range(rounds):
                    one_round(subjects, size, count)
        finally:
            gc.enable()
    floor = subjects[0].batches
    return [line_of(subject, size, floor[size]) for size in SIZES for subject in subjects]


def one_round(subjects: list[Contender], size: int, count: int) -> None:
    """Add a batch to each."""
    for subject in subjects:
        subject.batches.setdefault(size, []).append([])
    for _ in range(count):
        for subject in random.sample(subjects, len(subjects)):
            subject.batches[size][-1].append(subject.run(size))


def line_of(subject: Contender, size: int, floor: list[list[int]]) -> Line:
    """One row."""
    batches = subject.batches[size]
    ratios = sorted(Summary.of(own).p50 / Summary.of(other).p50 for own, other in zip(batches, floor, strict=True))
    times = Summary.of([sample for batch in batches for sample in batch]).scaled(1e-3)
    return Line(
        size, subject.name, times, (percentile(ratios, 0.5), percentile(ratios, 0.25), percentile(ratios, 0.75))
    )


def show(lines: list[Line]) -> None:
    """Print the table."""
    rows = [
        (
            f"{line.size} bytes, {line.subject}",
            *(f"{value:.0f}" for value in (line.times.p50, line.times.p90, line.times.p99)),
            f"{line.ratios[0]:.2f}",
            f"{line.ratios[1]:.2f}-{line.ratios[2]:.2f}",
        )
        for line in lines
    ]
    print(table(("a commit, in µs", "p50", "p90", "p99", "/ bare", "quartiles"), rows))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20, help="rounds a size (default %(default)s)")
    parser.add_argument("--commits", type=int, default=20, help="commits a round (default %(default)s)")
    parser.add_argument("--dir", default="/var/tmp", help="where to write: a real disk (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--check", action="store_true", help=f"exit with status 1 above {LIMIT} times the bare calls")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.commits) < 1:
        parser.error("--rounds and --commits are at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    options = parse(arguments)
    print(f"load before: {load_average()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch:
        lines = measure(contenders, Path(scratch), options.rounds, options.commits)
        show(lines)
        whole = measure(whole_commits, Path(scratch), options.rounds, options.commits)
        show(whole)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines + whole], indent=1) + "\n")
    missed = [line for line in lines if line.subject == SLOTS and line.ratios[0] > LIMIT]
    for line in missed if options.check else ():
        print(f"Limit missed: {line.size} bytes: {line.ratios[0]:.2f} times the bare calls, at most {LIMIT}")
    return 1 if options.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
