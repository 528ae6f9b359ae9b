"""The guest's serial console and QEMU's monitor, each one end of a socket pair whose other end QEMU inherited.

Nothing is read in the background: what the peer says waits in the socket until someone waits for it.
"""

from __future__ import annotations

import json
import re
import socket
from typing import Any

from .waiting import Deadline, DeadlineError

TAIL = 4000
"""Bytes of the console that an exception carries."""


class GuestGoneError(AssertionError):
    """QEMU closed the line, or the guest's kernel panicked."""


class Console:
    """A serial line, as a stream of bytes with a memory."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._unread = bytearray()
        self._tail = bytearray()

    def send(self, text: str) -> None:
        """Type `text`."""
        self._line.settimeout(10)
        self._line.sendall(text.encode())

    def read_until(self, pattern: re.Pattern[bytes], deadline: Deadline) -> tuple[bytes, re.Match[bytes]]:
        """What came before the first match of `pattern`, and the match. Both are consumed, what follows is not."""
        while (match := pattern.search(self._unread)) is None:
            if b"Kernel panic" in self._unread:
                raise GuestGoneError(f"the guest's kernel panicked\n{self.tail()}")
            self._receive(pattern, deadline)
        before = bytes(self._unread[: match.start()])
        # The match must outlive the buffer it was found in.
        kept = pattern.search(bytes(self._unread))
        assert kept is not None
        del self._unread[: match.end()]
        return before, kept

    def _receive(self, pattern: re.Pattern[bytes], deadline: Deadline) -> None:
        # A socket timeout of 0 would mean "do not block", which raises another exception.
        self._line.settimeout(max(0.001, deadline.remaining()))
        try:
            data = self._line.recv(65536)
        except TimeoutError as error:
            text = f"no {pattern.pattern!r} on the console within {deadline.seconds} s; its end:\n{self.tail()}"
            raise DeadlineError(text) from error
        except ConnectionResetError:
            data = b""
        if not data:
            raise GuestGoneError(f"the console was closed; its end:\n{self.tail()}")
        self._unread += data
        self._tail += data
        del self._tail[:-TAIL]

    def tail(self) -> str:
        """The last that was said on the line."""
        return self._tail.decode(errors="replace")


class Monitor:
    """QMP (QEMU's docs/interop/qmp-spec): one JSON object a line."""

    def __init__(self, line: socket.socket) -> None:
        self._line = line
        self._unread = bytearray()

    def execute(self, command: str, arguments: dict[str, Any] | None = None, seconds: float = 20) -> Any:
        """Run a command and return what it returned. Events that came before are dropped."""
        deadline = Deadline(seconds)
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        self._line.settimeout(seconds)
        self._line.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._next(deadline)
            if "error" in message:
                raise AssertionError(f"QMP {command}: {message['error']}")
            if "return" in message:
                return message["return"]

    def await_event(self, name: str, seconds: float = 20) -> dict[str, Any]:
        """The next event called `name`; others are dropped."""
        deadline = Deadline(seconds)
        while True:
            message = self._next(deadline)
            if message.get("event") == name:
                return message

    def greet(self) -> None:
        """Take QEMU's greeting and leave the negotiation mode."""
        self._next(Deadline(20))
        self.execute("qmp_capabilities")

    def _next(self, deadline: Deadline) -> dict[str, Any]:
        while b"\n" not in self._unread:
            self._line.settimeout(max(0.001, deadline.remaining()))
            try:
                data = self._line.recv(65536)
            except TimeoutError as error:
                raise DeadlineError(f"QMP was silent for {deadline.seconds} s") from error
            except ConnectionResetError:
                data = b""
            if not data:
                raise GuestGoneError("QMP was closed")
            self._unread += data
        line, _, rest = bytes(self._unread).partition(b"\n")
        self._unread[:] = rest
        message = json.loads(line)
        assert isinstance(message, dict)
        return message
