"""Round trip times, start time and memory of crbd beside swtpm and two echo servers, in one run. See README.md.

Usage: python bench/roundtrip.py [--quick] [--json FILE] [--check] [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from daemons import (
    BARE_CRBD,
    CRBD,
    SUBJECTS,
    SWTPM,
    TPMS,
    DidNotRunError,
    Programs,
    describe_machine,
    find_programs,
    load_average,
    unwind_at_sigterm,
)
from figures import Summary, percentile, table
from measure import (
    CRYPTO,
    OPERATIONS,
    QUICK,
    Bench,
    Failures,
    Layout,
    RoundTrips,
)

ONE_CPU = "one CPU"
TWO_CPUS = "two CPUs"

QUICK_LIMITS = {ONE_CPU: 1.6, TWO_CPUS: 1.1}
"""How many times swtpm's p50 a quick command may take, by layout."""
CRYPTO_LIMIT = 1.05
"""How many times swtpm's p50 a signature may take."""
DEVICE_LIMIT_US = 5.0
"""What a quick command's p50 may cost more than without the CRB device, in µs."""
START_LIMIT_MS = 300.0
"""From exec to the first reply, p50."""
RSS_LIMIT_MB = 40.0
"""Resident memory after the start, in 10^6 bytes."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the round trip table.

    Times are in microseconds. `ratios` are p50 as multiples of swtpm's p50 in the same round: median and quartiles over
    all rounds. The machine's speed changes within a run, and such a ratio feels that less than one over all samples.
    """

    layout: str
    operation: str
    subject: str
    times: Summary
    ratios: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """One limit and what was measured; `value` is None where it could not be measured."""

    what: str
    value: float | None
    bound: float

    @property
    def met(self) -> bool:
        """Measured, and within the bound."""
        return self.value is not None and self.value <= self.bound


@dataclass(slots=True)
class Report:
    """Everything one run found out."""

    machine: dict[str, str]
    trips: list[RoundTrips]
    starts: dict[str, list[int]]
    failures: Failures


def lines_of(trips: RoundTrips) -> list[Line]:
    """The round trip table of one layout."""
    lines = []
    for operation in OPERATIONS:
        by_subject = trips.batches.get(operation, {})
        for subject, batches in by_subject.items():
            times = Summary.of([sample for batch in batches for sample in batch]).scaled(1e-3)
            ratios = _ratios(batches, by_subject[SWTPM]) if SWTPM in by_subject and subject != SWTPM else None
            lines.append(Line(trips.layout.name, operation, subject, times, ratios))
    return lines


def _ratios(batches: list[list[int]], swtpm: list[list[int]]) -> tuple[float, float, float]:
    ratios = sorted(Summary.of(own).p50 / Summary.of(other).p50 for own, other in zip(batches, swtpm, strict=False))
    return percentile(ratios, 0.50), percentile(ratios, 0.25), percentile(ratios, 0.75)


def judge(report: Report) -> list[Verdict]:
    """crbd against the limits."""
    verdicts = []
    for trips in report.trips:
        ratios = {line.operation: line.ratios for line in lines_of(trips) if line.subject == CRBD}
        for operation in QUICK + CRYPTO:
            found = ratios.get(operation)
            bound = QUICK_LIMITS[trips.layout.name] if operation in QUICK else CRYPTO_LIMIT
            what = f"{operation}, {trips.layout.name}: p50 as a multiple of swtpm's"
            verdicts.append(Verdict(what, found[0] if found else None, bound))
        if BARE_CRBD in trips.memory:
            verdicts += [_device_cost(trips, operation) for operation in QUICK]
    starts = report.starts.get(CRBD)
    verdicts.append(
        Verdict("exec to first reply: p50 in ms", Summary.of(starts).p50 / 1e6 if starts else None, START_LIMIT_MS)
    )
    resident = [trips.memory[CRBD].rss / 1e6 for trips in report.trips if CRBD in trips.memory]
    verdicts.append(Verdict("resident memory after the start in MB", max(resident, default=None), RSS_LIMIT_MB))
    return verdicts


def _device_cost(trips: RoundTrips, operation: str) -> Verdict:
    """What the way through the CRB device costs a quick command, in µs: the median of the rounds' differences."""
    batches = trips.batches.get(operation, {})
    differences = sorted(
        (Summary.of(through).p50 - Summary.of(bare).p50) / 1e3
        for through, bare in zip(batches.get(CRBD, []), batches.get(BARE_CRBD, []), strict=False)
    )
    what = f"{operation}, {trips.layout.name}: cost of the CRB device in µs"
    return Verdict(what, percentile(differences, 0.50) if differences else None, DEVICE_LIMIT_US)


def show(report: Report) -> None:
    """Print the tables."""
    for trips in report.trips:
        layout = trips.layout
        print(f"\nRound trips in µs, {layout.name} (client on CPU {layout.client}, daemon on CPU {layout.daemon})\n")
        rows = [_round_trip_row(line) for line in lines_of(trips)]
        print(table(("operation", "subject", "samples", "p50", "p90", "p99", "/ swtpm", "quartiles"), rows))
    print("\nThe ratio to swtpm is that of the p50 of two batches in one round: median and quartiles over all rounds.")
    durable = "is synced (fsync option)" if "fsync" in report.machine["swtpm"] else "is written, but not synced to disk"
    print(f"NV_Write: before crbd answers, the new state is synced to disk; before swtpm answers, it {durable}.")
    print("\nStart (with existing state, exec to first answered command, in ms) and memory after it (MB)\n")
    print(table(("subject", "starts", "p50", "max", "RSS", "PSS", "libtpms"), _start_rows(report)))
    for subject, reason in report.failures.reasons.items():
        print(f"\nDid not run: {subject}: {reason}")


def _round_trip_row(line: Line) -> list[str]:
    times = [f"{value:.1f}" for value in (line.times.p50, line.times.p90, line.times.p99)]
    whole, low, high = line.ratios or (1.0, None, None)
    noise = "" if low is None else f"{low:.2f}-{high:.2f}"
    return [line.operation, line.subject, str(line.times.count), *times, f"{whole:.2f}" if line.ratios else "", noise]


def _start_rows(report: Report) -> list[list[str]]:
    rows = []
    trips = report.trips[-1]
    for subject, memory in trips.memory.items():
        times = Summary.of(report.starts[subject]).scaled(1e-6) if subject in report.starts else None
        start = [str(times.count), f"{times.p50:.1f}", f"{times.maximum:.1f}"] if times else ["", "", ""]
        sizes = [f"{memory.rss / 1e6:.1f}", f"{memory.pss / 1e6:.1f}"]
        rows.append([subject, *start, *sizes, trips.libtpms.get(subject, "")])
    return rows


def as_json(report: Report, verdicts: list[Verdict]) -> dict[str, object]:
    """The report for programs; times in microseconds, sizes in bytes."""
    return {
        "machine": report.machine,
        "round_trips": [asdict(line) for trips in report.trips for line in lines_of(trips)],
        "starts": {subject: asdict(Summary.of(times).scaled(1e-3)) for subject, times in report.starts.items()},
        "memory": {
            trips.layout.name: {subject: asdict(memory) for subject, memory in trips.memory.items()}
            for trips in report.trips
        },
        "libtpms": report.trips[-1].libtpms,
        "limits": [asdict(verdict) | {"met": verdict.met} for verdict in verdicts],
        "did_not_run": report.failures.reasons,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60, help="rounds a layout (default %(default)s)")
    parser.add_argument("--commands", type=int, default=50, help="commands a batch (default %(default)s)")
    parser.add_argument("--starts", type=int, default=15, help="starts a daemon (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="5 rounds, 20 commands, 3 starts: does it work?")
    parser.add_argument(
        "--cpus", choices=("1", "2", "both"), default="both", help="client and daemon on one or two CPUs"
    )
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS), help="what to measure")
    parser.add_argument("--python", default=sys.executable, help="interpreter for crbd (default: this one)")
    parser.add_argument("--swtpm", default="swtpm", help="swtpm's program (default: the one on PATH)")
    parser.add_argument(
        "--swtpm-fsync", action="store_true", help="let swtpm sync its state, if it can (0.11 and later)"
    )
    parser.add_argument(
        "--dir", default="/var/tmp", help="where the states live while measured: a real disk (%(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    parser.add_argument("--check", action="store_true", help="exit with status 1 when crbd does not meet its limits")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.commands, options.starts = 5, 20, 3
    if min(options.rounds, options.commands, options.starts) < 1:
        parser.error("--rounds, --commands and --starts are at least 1")
    return options


def layouts_of(wanted: str) -> list[Layout]:
    """The layouts to measure on the CPUs that are allowed here; two CPUs are left out where there is one."""
    cpus = sorted(os.sched_getaffinity(0))
    layouts = [Layout(ONE_CPU, cpus[0], cpus[0])] if wanted != "2" else []
    if wanted != "1" and len(cpus) > 1:
        layouts.append(Layout(TWO_CPUS, cpus[0], cpus[1]))
    if not layouts:
        raise DidNotRunError("--cpus 2: only one CPU is allowed here")
    return layouts


def measure(options: argparse.Namespace, programs: Programs, scratch: Path) -> Report:
    """Run everything."""
    bench = Bench(programs, scratch, options.rounds, options.commands, options.starts, _progress)
    report = Report(describe_machine(programs, scratch), [], {}, bench.failures)
    for name, value in report.machine.items():
        print(f"{name + ':':17}{value}", flush=True)
    subjects = [subject for subject in SUBJECTS if subject in options.subjects]
    layouts = layouts_of(options.cpus)
    for layout in layouts:
        report.trips.append(bench.round_trips(layout, subjects))
    report.starts = bench.starts(layouts[-1], [subject for subject in subjects if subject in TPMS])
    _progress("")
    report.machine["load after"] = load_average()
    print(f"{'load after:':17}{report.machine['load after']}")
    return report


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    options = parse(arguments)
    unwind_at_sigterm()
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch:
            programs = find_programs(options.python, options.swtpm, options.swtpm_fsync, Path(scratch))
            report = measure(options, programs, Path(scratch))
    except DidNotRunError as error:
        print(f"roundtrip: {error}", file=sys.stderr)
        return 1
    show(report)
    verdicts = judge(report)
    if options.json:
        options.json.write_text(json.dumps(as_json(report, verdicts), indent=1) + "\n")
    missed = [verdict for verdict in verdicts if not verdict.met]
    if options.check:
        for verdict in missed:
            value = "not measured" if verdict.value is None else f"{verdict.value:.2f}"
            print(f"Limit missed: {verdict.what}: {value}, at most {verdict.bound:g}")
        print(f"\n{len(verdicts) - len(missed)} of {len(verdicts)} limits met")
    return 1 if report.failures.reasons or (options.check and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
