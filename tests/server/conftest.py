"""Closes what the tests' clients left open."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from trio.testing import MockClock

from .daemons import Client


@pytest.fixture(autouse=True)
def clients_closed() -> Iterator[None]:
    """A test may leave its clients open, as a killed QEMU does."""
    yield
    while Client.opened:
        Client.opened.pop().abandon()


@pytest.fixture
def patient_clock() -> MockClock:
    """Time that jumps when nothing has happened for a while, so that threads get their turn."""
    return MockClock(autojump_threshold=0.1)
