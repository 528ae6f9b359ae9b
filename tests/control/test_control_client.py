"""Replies out of a stream."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.client import MAX_BUFFERED, ReplyDecoder
from crbd.control.spec import MAX_STATE_BLOB
from crbd.errors import WireError

from .feeding import cut
from .samples import REPLIES

SAMPLES = [(kind, bytes.fromhex(text), reply) for kind, text, reply in REPLIES]


@pytest.mark.parametrize(("kind", "data", "reply"), SAMPLES)
def test_byte_by_byte(kind: type[m.Request], data: bytes, reply: m.Reply) -> None:
    decoder = ReplyDecoder()
    decoder.expect(kind)
    for index in range(len(data)):
        assert decoder.next_reply() is None
        decoder.receive(data[index : index + 1])
    assert decoder.next_reply() == reply
    assert decoder.next_reply() is None


@given(st.lists(st.sampled_from(SAMPLES), max_size=10), st.lists(st.integers(0, 200)))
def test_any_cuts(samples: list[tuple[type[m.Request], bytes, m.Reply]], places: list[int]) -> None:
    decoder = ReplyDecoder()
    for kind, _, _ in samples:
        decoder.expect(kind)
    replies = []
    for piece in cut(b"".join(data for _, data, _ in samples), places):
        decoder.receive(piece)
        while (reply := decoder.next_reply()) is not None:
            replies.append(reply)
    assert replies == [reply for _, _, reply in samples]


def test_replies_that_were_fetched_are_not_held() -> None:
    blob = m.StateBlob(0, total_length=MAX_STATE_BLOB, data=bytes(MAX_STATE_BLOB))
    data = m.encode_reply(blob)
    decoder = ReplyDecoder()
    for _ in range(MAX_BUFFERED // len(data) + 2):
        decoder.expect(m.GetStateBlob)
        decoder.receive(data)
        assert decoder.next_reply() == blob
    with pytest.raises(WireError):
        decoder.receive(bytes(MAX_BUFFERED + 1))


def test_refusal_of_get_stateblob_in_4_bytes_is_taken_only_at_the_end() -> None:
    decoder = ReplyDecoder()
    decoder.expect(m.GetStateBlob)
    decoder.receive(b"\0\0\0\x0a")
    assert decoder.next_reply() is None
    assert decoder.next_reply(final=True) == m.Failure(10)


def test_bytes_that_nobody_asked_for() -> None:
    decoder = ReplyDecoder()
    decoder.expect(m.Stop)
    decoder.receive(bytes(5))
    assert decoder.next_reply() == m.Done()
    with pytest.raises(WireError):
        decoder.next_reply()


def test_declared_too_long_is_refused_at_once() -> None:
    decoder = ReplyDecoder()
    decoder.expect(m.GetStateBlob)
    decoder.receive(bytes(12) + (MAX_STATE_BLOB + 1).to_bytes(4, "big"))
    with pytest.raises(WireError):
        decoder.next_reply()
