"""The checked reader."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import WireError
from crbd.wire.reader import Reader

BYTES = bytes(range(1, 9))
NUMBERS: list[tuple[Callable[[Reader], int], int, int]] = [
    (Reader.u8, 1, 0x01),
    (Reader.u16_be, 2, 0x0102),
    (Reader.u32_be, 4, 0x01020304),
    (Reader.u64_be, 8, 0x0102030405060708),
    (Reader.u16_le, 2, 0x0201),
    (Reader.u32_le, 4, 0x04030201),
    (Reader.u64_le, 8, 0x0807060504030201),
]


@pytest.mark.parametrize(("read", "size", "value"), NUMBERS)
def test_number(read: Callable[[Reader], int], size: int, value: int) -> None:
    reader = Reader(BYTES)
    assert read(reader) == value
    assert reader.position == size
    assert reader.remaining == 8 - size


@pytest.mark.parametrize(("read", "size", "value"), NUMBERS)
def test_number_cut_short_reads_nothing(read: Callable[[Reader], int], size: int, value: int) -> None:
    reader = Reader(BYTES[: size - 1])
    with pytest.raises(WireError):
        read(reader)
    assert reader.position == 0


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_take_and_rest(kind: Callable[[bytes], bytes | bytearray | memoryview]) -> None:
    reader = Reader(kind(BYTES))
    assert reader.take(3) == BYTES[:3]
    with pytest.raises(WireError):
        reader.expect_end()
    assert reader.rest() == BYTES[3:]
    assert reader.rest() == b""
    reader.expect_end()


@pytest.mark.parametrize("count", [9, 1 << 62, -1])
def test_take_of_what_is_not_there(count: int) -> None:
    reader = Reader(BYTES)
    with pytest.raises(WireError):
        reader.take(count)
    assert reader.rest() == BYTES


@given(st.binary(max_size=40), st.lists(st.integers(0, 12)))
def test_pieces_are_the_whole(data: bytes, counts: list[int]) -> None:
    reader = Reader(data)
    pieces = []
    for count in counts:
        if count <= reader.remaining:
            pieces.append(reader.take(count))
    assert b"".join(pieces) + reader.rest() == data
