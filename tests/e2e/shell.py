"""A shell in the test guest, commanded over its serial console; the protocol is that of guest/init."""

from __future__ import annotations

import base64
import itertools
import re
from dataclasses import dataclass

from .console import Console
from .waiting import Deadline

_READY = re.compile(rb"crbd-guest: ready\r?\n")
_PIECE = 2000
"""Characters of a script in one console line; a terminal holds 4095."""


@dataclass(frozen=True, slots=True)
class Output:
    """What a command in the guest ended with and said (both streams, in the guest's order)."""

    status: int
    text: str


class Shell:
    """The shell at the other end of a console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._numbers = itertools.count()

    def await_boot(self, seconds: float) -> None:
        """Until the guest has booted."""
        self.console.read_until(_READY, Deadline(seconds))
        # A line break is sent as one byte from now on, and what we type does not come back.
        self.console.send("stty -echo -onlcr\n")

    def run(self, script: str, seconds: float = 60) -> Output:
        """Run a /bin/sh script in the guest to its end. DeadlineError if it has none within `seconds`."""
        deadline = Deadline(seconds)
        name = f"s{next(self._numbers)}"
        encoded = base64.b64encode(script.encode()).decode()
        for start in range(0, len(encoded), _PIECE):
            self.console.send(f"put {name} {encoded[start : start + _PIECE]}\n")
            self.console.read_until(re.compile(rb"crbd-guest: more %s\r?\n" % name.encode()), deadline)
        self.console.send(f"run {name}\n")
        self.console.read_until(re.compile(rb"crbd-guest: begin %s\r?\n" % name.encode()), deadline)
        end = re.compile(rb"\ncrbd-guest: end %s (\d+)\r?\n" % name.encode())
        said, match = self.console.read_until(end, deadline)
        return Output(int(match[1]), said.decode(errors="replace"))

    def read(self, script: str, seconds: float = 60) -> str:
        """What a script says that must succeed, without the last line break."""
        output = self.run(script, seconds)
        assert output.status == 0, f"status {output.status} from the guest's\n{script}\n{output.text}"
        return output.text.removesuffix("\n")
