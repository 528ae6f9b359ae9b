"""A service manager as a service sees it: notify socket, descriptor store, passed sockets. systemd: tests/e2e.

It does what sd_notify(3), sd_listen_fds(3) and systemd.service(5) say of FDSTORE, FDSTOREREMOVE, FDNAME and BARRIER.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.cli.process import PATIENCE, wait_until

_STARTER = """
import fcntl, os, sys
given = []
for number in filter(None, sys.argv[1].split(",")):
    given.append(fcntl.fcntl(int(number), fcntl.F_DUPFD, 100))
    os.close(int(number))
for target, number in enumerate(given, 3):
    os.dup2(number, target, inheritable=True)
    os.close(number)
os.environ["LISTEN_PID"] = os.environ["WATCHDOG_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "crbd", *sys.argv[2:]])
"""


class ServiceManager:
    """What it heard and what it keeps. `takes` is whether it keeps descriptors at all."""

    def __init__(self, place: Path, *, takes: bool = True) -> None:
        self.path = place / "notify"
        self.takes = takes
        self.heard: list[str] = []
        """Lines, in the order in which they came; not those about descriptors."""
        self.kept: dict[str, int] = {}
        self.before: Callable[[str], None] | None = None
        """Called with the name of a descriptor that is to be kept or forgotten, before it is."""
        self.pid = 0
        """Of the service started last."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RD)
        self._listener.join(PATIENCE)
        self._socket.close()
        self.let_go()

    def let_go(self) -> None:
        """As systemd does when a service has stopped and is not to be started again."""
        while self.kept:
            os.close(self.kept.popitem()[1])

    def catch_up(self) -> None:
        """Return when all that was sent until now is dealt with."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"X_CAUGHT_UP=1", str(self.path))
        wait_until(lambda: "X_CAUGHT_UP=1" in self.heard, "the end of the queue")

    def _listen(self) -> None:
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._socket, 4096, 8)
            if not data:
                return
            self._take(data.decode().splitlines(), descriptors)

    def _take(self, lines: Sequence[str], descriptors: Sequence[int]) -> None:
        said = dict(line.split("=", 1) for line in lines)
        if self.before is not None and "FDNAME" in said:
            self.before(said["FDNAME"])
        if said.get("FDSTORE") == "1" and self.takes:
            assert said["FDPOLL"] == "0"
            (self.kept[said["FDNAME"]],) = descriptors
            return
        if said.get("FDSTOREREMOVE") == "1":
            if said["FDNAME"] in self.kept:
                os.close(self.kept.pop(said["FDNAME"]))
        elif "BARRIER" not in said and "FDSTORE" not in said:
            self.heard += lines
        for descriptor in descriptors:
            os.close(descriptor)

    @contextmanager
    def service(
        self,
        *arguments: str | Path,
        sockets: Mapping[str, socket.socket] | None = None,
        environment: Mapping[str, str] | None = None,
        program: Sequence[str] = ("serve",),
    ) -> Iterator[subprocess.Popen[str]]:
        """The service as a process, from the moment that it says to be ready; it gets all that is kept."""
        passed = {name: each.fileno() for name, each in (sockets or {}).items()} | self.kept
        self.heard.clear()
        variables = {
            "NOTIFY_SOCKET": str(self.path),
            "LISTEN_FDS": str(len(passed)),
            "LISTEN_FDNAMES": ":".join(passed),
            **(environment or {}),
        }
        numbers = ",".join(map(str, passed.values()))
        command = [sys.executable, "-c", _STARTER, numbers, *program, *map(str, arguments)]
        with subprocess.Popen(
            command, env=os.environ | variables, pass_fds=tuple(passed.values()), stderr=subprocess.PIPE, text=True
        ) as process:
            self.pid = process.pid
            try:
                wait_until(lambda: "READY=1" in self.heard or process.poll() is not None, "READY=1")
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
                yield process
            finally:
                process.kill()


@contextmanager
def service_manager(place: Path, *, takes: bool = True) -> Iterator[ServiceManager]:
    """One, with its socket in `place`."""
    manager = ServiceManager(place, takes=takes)
    try:
        yield manager
    finally:
        manager.close()
