"""The engine lock: one user of the TPM at a time, and no user who waits for ever.

The data channel takes the lock for each command, thousands of times a second, and a plain lock may give it to the same
thread again and again while another one waits. So whoever takes it for something else (a control command, the end) also
holds a turnstile, and the data channel does not pass while somebody is in there.
"""

from __future__ import annotations

import threading
from types import TracebackType


class EngineLock:
    """As a context: for anything but a command from the data channel. Not reentrant."""

    __slots__ = ("_contested", "_engine", "_turnstile")

    def __init__(self) -> None:
        self._engine = threading.Lock()
        self._turnstile = threading.Lock()
        self._contested = self._turnstile.locked

    def for_command(self) -> threading.Lock:
        """The lock to hold for one command from the data channel; lets everybody else go first."""
        if self._contested():
            with self._turnstile:
                pass
        return self._engine

    def __enter__(self) -> None:
        self._turnstile.acquire()
        self._engine.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._engine.release()
        self._turnstile.release()
