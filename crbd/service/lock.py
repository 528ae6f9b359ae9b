"""The engine lock: one user of the TPM at a time, and no user who waits for ever.

The data channel takes the lock for each command, thousands of times a second, and a plain lock may give it to the same
thread again and again while another one waits. So whoever takes it for something else (a control command, the end) also
holds a turnstile, and the data channel does not pass while somebody is in there.
"""

from __future__ import annotations

import threading
from types import TracebackType


class EngineLock:
    """As a context: for anything but a command from the data channel. Not reentrant.

    For a command: `if contested(): let_others_go_first()`, then hold `engine`. In steps, because the way of a command
    has no time for a method around them.
    """

    __slots__ = ("_turnstile", "contested", "engine")

    def __init__(self) -> None:
        self.engine = threading.Lock()
        self._turnstile = threading.Lock()
        self.contested = self._turnstile.locked
        """Whether somebody else has or wants the engine."""

    def let_others_go_first(self) -> None:
        """Return when nobody else has or wants the engine any more."""
        with self._turnstile:
            pass

    def __enter__(self) -> None:
        self._turnstile.acquire()
        self.engine.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.engine.release()
        self._turnstile.release()
