"""Waiting for a condition with a deadline."""

from __future__ import annotations

import time


class DeadlineError(AssertionError):
    """What was waited for did not happen in time; the text says what and carries the evidence."""


class Deadline:
    """A moment in the future, `seconds` from now (monotonic clock)."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def remaining(self) -> float:
        """Seconds left, 0 if there are none."""
        return max(0.0, self._end - time.monotonic())

    @property
    def passed(self) -> bool:
        """Whether no time is left."""
        return self.remaining() == 0
