"""How soon the control channel answers while the TPM makes an RSA key, and whether CANCEL_TPM_CMD takes. See README.md.

Usage: python bench/responsive.py [--commands N] [--cpus 1|all] [--json FILE] [--help]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import commands
import control
from daemons import TPMS, Daemon, DidNotRunError, Programs, bound_to, describe_machine, find_programs, unwind_at_sigterm
from figures import Summary, table

PACE_MS = 1
"""Pause in milliseconds between two control requests."""

CANCEL_AFTER_MS = (5, 40)
"""When CANCEL_TPM_CMD is sent: this many milliseconds after the command, at random."""

KEY_SIZES = (4096, 3072, 2048)
"""RSA key sizes in bits to try: the largest that every TPM here has is measured."""

KEY_DEADLINE = 120.0
"""Seconds that one key may take."""

ALONE = "CreatePrimary, not cancelled"
IDLE = "GET_CAPABILITY, TPM idle"
BUSY = "GET_CAPABILITY, TPM computes"
CANCEL = "CANCEL_TPM_CMD, TPM computes"
GAVE_UP = "first CANCEL to response"
MEASURED = (ALONE, IDLE, BUSY, CANCEL, GAVE_UP)


@dataclass(slots=True)
class Contender:
    """One daemon under measurement; `times` are in nanoseconds by what was measured."""

    daemon: Daemon
    data: socket.socket
    control: socket.socket
    times: dict[str, list[int]] = field(default_factory=lambda: {what: [] for what in MEASURED})
    sent: int = 0
    """Commands that were to be cancelled and still ran then."""
    cancelled: int = 0
    """Those of them that came back with TPM_RC_CANCELED."""

    def timed(self, what: str, request: int) -> None:
        """Send one control request, and note how long its reply took. Raises DidNotRunError if it is refused."""
        begin = time.perf_counter_ns()
        result, _ = control.ask(self.control, request)
        self.times[what].append(time.perf_counter_ns() - begin)
        if result != control.SUCCESS:
            raise DidNotRunError(f"{self.daemon.subject}: control command {request:#x} answered {result:#x}")

    def answered(self, within_ms: float) -> bool:
        """Whether the TPM's response is there, or comes within so many milliseconds."""
        return bool(select.select([self.data], [], [], within_ms / 1000)[0])


def run_command(contender: Contender, command: bytes, cancel_after_ms: float | None) -> None:
    """One long command, with control requests until its response is there.

    Raises DidNotRunError for an unexpected response.
    """
    contender.timed(IDLE, control.GET_CAPABILITY)
    begin = time.perf_counter_ns()
    contender.data.sendall(command)
    first_cancel = None
    if cancel_after_ms is not None and not contender.answered(cancel_after_ms):
        first_cancel = time.perf_counter_ns()
        contender.sent += 1
    while not contender.answered(PACE_MS):
        if first_cancel is not None:
            contender.timed(CANCEL, control.CANCEL_TPM_CMD)
        contender.timed(BUSY, control.GET_CAPABILITY)
    response = contender.data.recv(4096)
    end = time.perf_counter_ns()
    if first_cancel is not None:
        contender.times[GAVE_UP].append(end - first_cancel)
    elif cancel_after_ms is None:
        contender.times[ALONE].append(end - begin)
    _settle(contender, response, first_cancel is not None)


def _settle(contender: Contender, response: bytes, may_be_cancelled: bool) -> None:
    code = commands.response_code(response) if len(response) >= commands.HEAD.size else -1
    if code == commands.RC_CANCELED and may_be_cancelled:
        contender.cancelled += 1
        return
    if code != commands.RC_SUCCESS:
        raise DidNotRunError(f"{contender.daemon.subject}: CreatePrimary answered {response[:10].hex() or '(closed)'}")
    contender.data.sendall(commands.flush_context(commands.first_handle(response)))
    contender.data.recv(4096)


def has_key_size(contender: Contender, bits: int) -> bool:
    """Whether this TPM makes RSA keys of so many bits; makes one to find out."""
    contender.data.sendall(commands.create_primary_rsa(bits))
    response = contender.data.recv(4096)
    if commands.response_code(response) != commands.RC_SUCCESS:
        return False
    _settle(contender, response, False)
    return True


def enter(running: ExitStack, subject: str, programs: Programs, scratch: Path, cpus: set[int]) -> Contender:
    """Start a daemon, and connect to both of its sockets. Raises DidNotRunError."""
    daemon = running.enter_context(Daemon(subject, scratch / subject, programs, cpus))
    data = running.enter_context(daemon.first_reply())
    connection = running.enter_context(daemon.connect_control())
    for end in (data, connection):
        end.settimeout(KEY_DEADLINE)
    return Contender(daemon, data, connection)


def measure(options: argparse.Namespace, contenders: list[Contender]) -> int:
    """Let the contenders take turns, command by command; every second one is cancelled. Returns the bits of a key."""
    wanted = [options.bits] if options.bits else KEY_SIZES
    sizes = (size for size in wanted if all(has_key_size(contender, size) for contender in contenders))
    bits = next(sizes, None)
    if bits is None:
        raise DidNotRunError(f"no TPM here makes RSA keys of {' or '.join(map(str, wanted))} bits")
    chance = random.Random(options.seed)
    for number in range(options.commands):
        cancel_after = chance.uniform(*CANCEL_AFTER_MS) if number % 2 else None
        command = commands.create_primary_rsa(bits, chance.randbytes(16))
        for contender in contenders:
            run_command(contender, command, cancel_after)
    return bits


def show(bits: int, contenders: list[Contender]) -> None:
    """Print the tables."""
    print(f"\nWhile TPM2_CreatePrimary makes RSA-{bits} keys; times in ms\n")
    rows = []
    for what in MEASURED:
        for contender in contenders:
            times = contender.times[what]
            figures = Summary.of(times).scaled(1e-6) if times else None
            cells = [f"{value:.2f}" for value in (figures.p50, figures.p99, figures.maximum)] if figures else [""] * 3
            rows.append([what, contender.daemon.subject, str(len(times)), *cells])
    print(table(("what", "subject", "samples", "p50", "p99", "max"), rows))
    print()
    for contender in contenders:
        share = f"{100 * contender.cancelled / contender.sent:.0f} %" if contender.sent else "none to count"
        print(
            f"{contender.daemon.subject}: of {contender.sent} commands that CANCEL_TPM_CMD was sent for, "
            f"{contender.cancelled} came back with TPM_RC_CANCELED ({share})"
        )


def as_json(machine: dict[str, str], bits: int, contenders: list[Contender]) -> dict[str, object]:
    """The report for programs; times in milliseconds."""
    return {
        "machine": machine,
        "rsa_bits": bits,
        "subjects": {
            contender.daemon.subject: {
                "times": {what: asdict(Summary.of(t).scaled(1e-6)) for what, t in contender.times.items() if t},
                "cancel_sent": contender.sent,
                "cancelled": contender.cancelled,
            }
            for contender in contenders
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--commands", type=int, default=60, help="CreatePrimary commands a subject (default %(default)s)"
    )
    parser.add_argument("--bits", type=int, help="RSA key size (default: the largest of 4096, 3072, 2048 that works)")
    parser.add_argument("--cpus", choices=("1", "all"), default="all", help="CPUs for client and daemons together")
    parser.add_argument("--subjects", nargs="+", choices=TPMS, default=list(TPMS), help="what to measure")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the keys and the moments of CANCEL (default %(default)s)"
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter for crbd (default: this one)")
    parser.add_argument("--swtpm", default="swtpm", help="swtpm's program (default: the one on PATH)")
    parser.add_argument("--dir", default="/var/tmp", help="where the states live while measured (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE, too")
    options = parser.parse_args(arguments)
    unwind_at_sigterm()
    allowed = os.sched_getaffinity(0)
    cpus = {min(allowed)} if options.cpus == "1" else allowed
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch, ExitStack() as running:
            programs = find_programs(options.python, options.swtpm, False, Path(scratch))
            machine = describe_machine(programs, Path(scratch))
            running.enter_context(bound_to(cpus))
            contenders = [enter(running, subject, programs, Path(scratch), cpus) for subject in options.subjects]
            bits = measure(options, contenders)
    except (DidNotRunError, OSError) as error:
        print(f"responsive: {error}", file=sys.stderr)
        return 1
    for name, value in machine.items():
        print(f"{name + ':':17}{value}")
    show(bits, contenders)
    if options.json:
        options.json.write_text(json.dumps(as_json(machine, bits, contenders), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
