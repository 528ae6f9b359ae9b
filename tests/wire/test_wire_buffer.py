"""The receive buffer."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from crbd.errors import WireError
from crbd.wire.buffer import ReceiveBuffer

LIMIT = 64


def test_attempt_that_lacks_bytes_starts_over() -> None:
    buffer = ReceiveBuffer(LIMIT)
    buffer.append(b"head")
    assert buffer.consume(4) == b"head"
    assert buffer.consume(3) is None
    buffer.rollback()
    buffer.append(b"end")
    assert buffer.consume(4) == b"head"
    assert buffer.consume(3) == b"end"
    buffer.commit()
    assert len(buffer) == 0
    assert buffer.held == 0


def test_append_beyond_the_limit_adds_nothing() -> None:
    buffer = ReceiveBuffer(4)
    buffer.append(b"abc")
    with pytest.raises(WireError):
        buffer.append(b"de")
    assert buffer.peek(9) == b"abc"
    buffer.append(b"d")
    buffer.consume(1)
    with pytest.raises(WireError):
        buffer.append(b"e")
    buffer.commit()
    buffer.append(b"e")
    assert buffer.peek(9) == b"bcde"


class Model(RuleBasedStateMachine):
    """The buffer against three byte strings: committed, consumed, and not yet consumed."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReceiveBuffer(LIMIT)
        self.consumed = b""
        self.unread = b""

    @rule(data=st.binary(max_size=20))
    def append(self, data: bytes) -> None:
        if len(self.consumed + self.unread + data) > LIMIT:
            with pytest.raises(WireError):
                self.buffer.append(data)
        else:
            self.buffer.append(data)
            self.unread += data

    @rule(count=st.integers(0, 24))
    def consume(self, count: int) -> None:
        expected = self.unread[:count] if count <= len(self.unread) else None
        assert self.buffer.consume(count) == expected
        if expected is not None:
            self.consumed += expected
            self.unread = self.unread[count:]

    @precondition(lambda self: self.consumed)
    @rule()
    def commit(self) -> None:
        self.buffer.commit()
        self.consumed = b""
        assert self.buffer.held <= max(1, 2 * len(self.unread))

    @rule()
    def rollback(self) -> None:
        self.buffer.rollback()
        self.unread = self.consumed + self.unread
        self.consumed = b""

    @rule()
    def clear(self) -> None:
        self.buffer.clear()
        self.unread = self.consumed = b""

    @invariant()
    def same(self) -> None:
        assert len(self.buffer) == len(self.unread)
        assert self.buffer.peek(5) == self.unread[:5]


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=200))
def test_every_byte_is_moved_once_on_average(counts: list[int]) -> None:
    buffer = ReceiveBuffer(1 << 20)
    buffer.append(bytes(sum(counts)))
    moved = 0
    for count in counts:
        held = buffer.held
        assert buffer.consume(count) is not None
        buffer.commit()
        moved += buffer.held if buffer.held != held else 0
    assert moved <= sum(counts)
