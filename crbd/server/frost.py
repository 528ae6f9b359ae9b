"""Where tasks may be stopped so that another process can go on for them.

Theory. A task waits for the world at a few places: for a client to come, for bytes, for its turn, for a client to take
its answer. Those places are marked by `point`. When frost falls, every wait at a point ends, and none begins any more:
the task learns it by FrozenError and hands over where it stands. Everything between two points runs to its end as ever.
A point is either passed with the thing done that was waited for, or it raises with nothing done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import trio


class FrozenError(Exception):
    """The task is to hand over where it stands."""


class Frost:
    """One group of tasks that are frozen together. Used on the loop alone."""

    def __init__(self) -> None:
        self.fallen = False
        self._waiting: set[trio.CancelScope] = set()

    def fall(self) -> None:
        """Stop everybody at the next point."""
        self.fallen = True
        for scope in self._waiting:
            scope.cancel()

    @contextmanager
    def point(self) -> Iterator[None]:
        """Around one wait that trio either completes or cancels without a trace. Raises FrozenError."""
        with trio.CancelScope() as scope:
            if self.fallen:
                scope.cancel()
            self._waiting.add(scope)
            try:
                yield
            finally:
                self._waiting.discard(scope)
        if scope.cancelled_caught:
            raise FrozenError
