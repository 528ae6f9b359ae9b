"""Any bytes, and any mutation of good documents: a Document or a StateError, in bounded memory."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from crbd.errors import StateError, StateSealedError
from crbd.state.document import decode, encode
from crbd.state.fields import FieldReader
from crbd.state.header import MAGIC, MAX_DOCUMENT
from crbd.state.keys import MAX_SCRYPT_MEMORY, ScryptCost, decode_slot, unwrap

from . import samples as s
from .fuzz_document import SEALED, judged
from .mutations import mutations

GOOD = [encode(s.sample(), format_version=version) for version in (1, 2, 3)]


@given(st.one_of(st.binary(max_size=256), st.binary(max_size=256).map(lambda tail: MAGIC + tail)))
@example(b"")
def test_any_bytes(data: bytes) -> None:
    judged(data)
    judged(s.with_digest(data))


@given(st.sampled_from([*GOOD, SEALED]).flatmap(mutations))
def test_any_mutation(data: bytes) -> None:
    judged(data)


@given(st.sampled_from([*GOOD, SEALED]).flatmap(mutations))
def test_any_mutation_that_the_digest_does_not_find(data: bytes) -> None:
    judged(s.resummed(data))


@given(st.integers(0, len(SEALED) - 1), st.integers(1, 255))
def test_no_byte_of_a_sealed_document_may_change(place: int, flip: int) -> None:
    """Not even with a right SHA-256: key slots, header and body are authentic or refused."""
    data = s.resummed(SEALED[:place] + bytes((SEALED[place] ^ flip,)) + SEALED[place + 1 :])
    if data == SEALED:
        return  # The change was in the SHA-256 itself.
    with pytest.raises(StateError):
        decode(data, [s.other_key()])


def peak(work: Callable[[], object]) -> int:
    """Bytes allocated at the worst moment of `work`."""
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(data: bytes) -> Callable[[], None]:
    def work() -> None:
        with pytest.raises(StateError):
            decode(data, [s.other_key()] if data[12:13] == b"\1" else None)

    return work


LENGTHS = {"body_length": (16, 4), "header_length": (14, 2), "section length": (-1, 4), "key slots": (-2, 4)}


@pytest.mark.parametrize("field", LENGTHS)
def test_lengths_that_lie_allocate_nothing(field: str) -> None:
    place, size = LENGTHS[field]
    data = SEALED if field == "key slots" else GOOD[2]
    if field == "section length":
        place = data.index(b"tpm.permanent") + 13 + 4
    elif field == "key slots":
        place = 69 + len(s.WRITER)
    lie = s.resummed(data[:place] + b"\xff" * size + data[place + size :])
    refused(lie)()  # What is imported and cached on the first run is no cost of the lie.
    assert peak(refused(lie)) < 4 * len(data) + 64 * 1024


def test_a_document_over_the_cap_is_refused_in_constant_memory() -> None:
    small = peak(refused(MAGIC + bytes(MAX_DOCUMENT)))
    large = peak(refused(MAGIC + bytes(8 * MAX_DOCUMENT)))
    assert large < 64 * 1024
    assert abs(large - small) < 16 * 1024


@pytest.mark.parametrize("cost", [b"\x1f\xff\xff", b"\x16\x08\x01", b"\x12\x08\x05", b"\x00\x08\x01", b"\x0f\x00\x01"])
def test_a_slot_cannot_buy_more_memory_or_time_than_the_cap(cost: bytes) -> None:
    body = b"\x02\x01x" + cost + bytes(16 + 12 + 48)
    slot = decode_slot(FieldReader(len(body).to_bytes(2, "little") + body, "f", "key slots"), "f", 1)
    with pytest.raises(StateError, match="key slot x, field cost"):
        unwrap(slot, s.passphrase(), s.UUID_A, "f")
    assert ScryptCost().memory <= MAX_SCRYPT_MEMORY // 4


def test_sealed_is_known_without_trying() -> None:
    with pytest.raises(StateSealedError):
        decode(SEALED)
