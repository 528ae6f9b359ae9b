"""How long a client that never stops waits at a live upgrade of the daemon. See README.md.

Usage: python bench/upgrade.py [--upgrades N] [--check] [--help]
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import commands
import control
from daemons import CRBD, Daemon, DidNotRunError, bound_to, describe_machine, find_programs, unwind_at_sigterm
from figures import Summary, table

UPGRADE = 0xC1
LIMIT_MS = 500.0
"""At the 99th percentile."""
PATIENCE = 60.0
"""Seconds for one upgrade."""


class Traffic(threading.Thread):
    """Commands back to back on one connection. Each upgrade is the longest wait since the one before."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._command = commands.pcr_extend(16, bytes(32))
        self.stop = threading.Event()
        self.longest = 0
        """Nanoseconds; set to 0 by whoever wants to know the next one."""
        self.count = 0
        self.errors = 0

    def run(self) -> None:
        """Until `stop`."""
        while not self.stop.is_set():
            begin = time.perf_counter_ns()
            self._connection.sendall(self._command)
            response = self._connection.recv(4096)
            self.longest = max(self.longest, time.perf_counter_ns() - begin)
            self.count += 1
            if not response:
                self.errors += 1
                return
            self.errors += commands.response_code(response) != commands.RC_SUCCESS


def upgrade(connection: socket.socket) -> str:
    """Have it done; what the new program says. Raises DidNotRunError."""
    connection.sendall(control.request(UPGRADE))
    head = control.read_exactly(connection, 12)
    text = control.read_exactly(connection, int.from_bytes(head[8:], "big")).decode()
    if head[7] != 1:
        raise DidNotRunError(f"the upgrade was not done: {text}")
    return text


def measure(daemon: Daemon, upgrades: int) -> tuple[list[float], Traffic]:
    """The longest wait at each upgrade, in milliseconds, and the traffic."""
    waits: list[float] = []
    with daemon.first_reply() as data, daemon.connect_control() as ctrl:
        ctrl.settimeout(PATIENCE)
        traffic = Traffic(data)
        traffic.start()
        try:
            for _ in range(upgrades):
                traffic.longest = 0
                upgrade(ctrl)
                count = traffic.count
                while traffic.count < count + 2 and traffic.is_alive():
                    time.sleep(0.001)
                waits.append(traffic.longest / 1e6)
        finally:
            traffic.stop.set()
            traffic.join()
    return waits, traffic


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and report. Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--upgrades", type=int, default=100, help="how many (default %(default)s)")
    parser.add_argument("--check", action="store_true", help=f"exit status 1 if p99 is above {LIMIT_MS:.0f} ms")
    parser.add_argument("--dir", default="/var/tmp", help="where the state lives while measured (%(default)s)")
    options = parser.parse_args(arguments)
    unwind_at_sigterm()
    allowed = os.sched_getaffinity(0)
    try:
        with tempfile.TemporaryDirectory(prefix="crbd-bench-", dir=options.dir) as scratch, ExitStack() as running:
            programs = find_programs(sys.executable, "swtpm", False, Path(scratch))
            machine = describe_machine(programs, Path(scratch))
            running.enter_context(bound_to(allowed))
            daemon = running.enter_context(Daemon(CRBD, Path(scratch) / CRBD, programs, allowed))
            waits, traffic = measure(daemon, options.upgrades)
    except (DidNotRunError, OSError) as error:
        print(f"upgrade: {error}", file=sys.stderr)
        return 1
    for name, value in machine.items():
        print(f"{name + ':':17}{value}")
    found = Summary.of(waits)
    print(f"\n{traffic.count} commands, {traffic.errors} errors; the longest wait at each upgrade, milliseconds\n")
    row = [str(found.count), *(f"{value:.0f}" for value in (found.p50, found.p90, found.p99, found.maximum))]
    print(table(("upgrades", "p50", "p90", "p99", "max"), [row]))
    return int(traffic.errors > 0 or (options.check and found.p99 > LIMIT_MS))


if __name__ == "__main__":
    sys.exit(main())
