"""One connection: every message and its answer, whole, byte by byte and with others behind it; and all that is wrong.

Layouts are those of the specification, written out here once more.
"""

from __future__ import annotations

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.vfiouser.connection import Connection, Snapshot
from crbd.vfiouser.messages import Close, Event, Move, ReadRegisters, Reply, Reset, WriteRegisters

from . import client as c
from .conversation import answered, events, only_event, opened

INFO = c.message(9, c.INFO, struct.pack("<IIII", 16, 0, 0, 0))
ANSWERED = {
    "device info": (INFO, struct.pack("<IIII", 16, 3, 9, 5)),
    "BAR 0, asked with too little room": (c.region_info(9, 0), struct.pack("<IIIIQQ", 64, 0xF, 0, 32, 0x2000, 0)),
    "BAR 0": (
        c.region_info(9, 0, 64),
        struct.pack("<IIIIQQ", 64, 0xF, 0, 32, 0x2000, 0) + struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x1000, 0x1000),
    ),
    "BAR 1": (c.region_info(9, 1), struct.pack("<IIIIQQ", 32, 0, 1, 0, 0, 0)),
    "option ROM": (c.region_info(9, 6), struct.pack("<IIIIQQ", 32, 0, 6, 0, 0, 0)),
    "config space": (c.region_info(9, 7), struct.pack("<IIIIQQ", 32, 3, 7, 0, 256, 0)),
    "VGA": (c.region_info(9, 8, 1000), struct.pack("<IIIIQQ", 32, 0, 8, 0, 0, 0)),
    "region descriptors": (
        c.message(9, c.REGION_IO_FDS, struct.pack("<IIII", 16, 0, 0, 0)),
        struct.pack("<IIII", 16, 0, 0, 0),
    ),
    "irq info": (
        c.message(9, c.IRQ_INFO, struct.pack("<IIII", 16, 0, 4, 0)),
        struct.pack("<IIII", 16, 0, 4, 0),
    ),
    "no irqs": (c.message(9, c.SET_IRQS, struct.pack("<IIIII", 20, 0x21, 0, 0, 0)), b""),
    "DMA map": (c.dma_map(9, 0x100000, 1 << 30), b""),
    "DMA unmap": (c.dma_unmap(9, 0x100000, 1 << 30), struct.pack("<IIQQ", 24, 0, 0x100000, 1 << 30)),
    "config read": (
        c.read(9, 7, 0x0E, 2),
        struct.pack("<QII", 0x0E, 7, 2) + b"\0\0",
    ),
    "nothing read": (c.read(9, 7, 256, 0), struct.pack("<QII", 256, 7, 0)),
}
"""What the connection answers itself: the message and the reply's body."""
REFUSED = {
    "device info without room": (c.message(9, c.INFO, struct.pack("<IIII", 15, 0, 0, 0)), c.EINVAL),
    "device info cut short": (c.message(9, c.INFO, bytes(15)), c.EINVAL),
    "device info with more": (c.message(9, c.INFO, struct.pack("<IIIII", 16, 0, 0, 0, 0)), c.EINVAL),
    "region 9": (c.region_info(9, 9), c.EINVAL),
    "region 2^32-1": (c.region_info(9, 0xFFFFFFFF), c.EINVAL),
    "region info without room": (c.region_info(9, 0, 31), c.EINVAL),
    "region info cut short": (c.message(9, c.REGION_INFO, bytes(31)), c.EINVAL),
    "irq 5": (c.message(9, c.IRQ_INFO, struct.pack("<IIII", 16, 0, 5, 0)), c.EINVAL),
    "irqs that are not there": (c.message(9, c.SET_IRQS, struct.pack("<IIIII", 20, 0x24, 0, 0, 1)), c.EINVAL),
    "irqs, cut short": (c.message(9, c.SET_IRQS, bytes(19)), c.EINVAL),
    "DMA map cut short": (c.message(9, c.DMA_MAP, bytes(31)), c.EINVAL),
    "DMA unmap with more": (c.message(9, c.DMA_UNMAP, bytes(25)), c.EINVAL),
    "dirty pages": (c.dma_unmap(9, flags=1), c.ENOTSUP),
    "a read beyond BAR 0": (c.read(9, 0, 0x1FFD, 4), c.EINVAL),
    "a read at the end of the world": (c.read(9, 0, (1 << 64) - 4, 4), c.EINVAL),
    "a read of 4 GiB": (c.read(9, 0, 0, 0xFFFFFFFF), c.EINVAL),
    "a read of BAR 1": (c.read(9, 1, 0, 0), c.EINVAL),
    "a read of region 1000": (c.read(9, 1000, 0, 4), c.EINVAL),
    "a read with data": (c.message(9, c.READ, struct.pack("<QII", 0, 0, 4) + b"data"), c.EINVAL),
    "a read cut short": (c.message(9, c.READ, bytes(15)), c.EINVAL),
    "a read beyond config space": (c.read(9, 7, 255, 2), c.EINVAL),
    "a write beyond BAR 0": (c.write(9, 0, 0x1FFF, b"ab"), c.EINVAL),
    "a write of more than it has": (c.message(9, c.WRITE, struct.pack("<QII", 0, 0, 5) + b"four"), c.EINVAL),
    "a write of less than it has": (c.message(9, c.WRITE, struct.pack("<QII", 0, 0, 3) + b"four"), c.EINVAL),
    "a write cut short": (c.message(9, c.WRITE, bytes(15)), c.EINVAL),
    "a write beyond config space": (c.write(9, 7, 256, b"a"), c.EINVAL),
    "writes, one of them wrong": (c.write_multi(9, [(0, 0, b"ab"), (0, 0x2000, b"a")]), c.EINVAL),
    "more writes than there are": (c.message(9, c.WRITE_MULTI, struct.pack("<Q", 1 << 61)), c.EINVAL),
    "writes of 9 bytes": (
        c.message(9, c.WRITE_MULTI, struct.pack("<QQII8s", 1, 0, 0, 9, b"12345678")),
        c.EINVAL,
    ),
    "writes cut short": (c.message(9, c.WRITE_MULTI, bytes(7)), c.EINVAL),
    "a version for the second time": (c.version(9), c.EINVAL),
    "a migration feature": (c.message(9, c.FEATURE, struct.pack("<II", 8, 1 << 16 | 1)), c.ENOTSUP),
    "migration data": (c.message(9, c.MIG_READ, bytes(8)), c.ENOTSUP),
    "a command from server to client": (c.message(9, c.DMA_READ, bytes(16)), c.ENOTSUP),
    "command 0": (c.message(9, 0), c.ENOTSUP),
    "command 14": (c.message(9, 14), c.ENOTSUP),
    "command 65535": (c.message(9, 0xFFFF, bytes(100)), c.ENOTSUP),
}
EVENTS = (
    c.read(9, 0, 0x44, 4),
    c.write(9, 0, 0x4C, b"\1\0\0\0"),
    c.write(9, 7, 0x10, b"\0\0\0\xfe"),
    c.message(9, c.RESET),
)
"""What the connection leaves to its owner."""


@pytest.mark.parametrize(("sent", "body"), ANSWERED.values(), ids=ANSWERED)
def test_what_is_answered(sent: bytes, body: bytes) -> None:
    whole = answered(opened(), sent)
    assert whole == c.Answer(9, whole.command, body)

    bytewise = opened()
    found: list[Event] = []
    for at in range(len(sent)):
        assert not found, "an answer before the message was whole"
        found += events(bytewise, sent[at : at + 1])
    (reply,) = found
    assert isinstance(reply, Reply)
    assert c.answer(reply.data) == whole

    together = events(opened(), sent + INFO + sent[:7])
    assert together[0] == reply
    assert len(together) == 2


@pytest.mark.parametrize(("sent", "errno"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_and_the_connection_goes_on(sent: bytes, errno: int) -> None:
    connection = opened()
    reply, after = events(connection, sent + INFO)
    assert isinstance(reply, Reply)
    assert isinstance(after, Reply)
    assert c.answer(reply.data).errno == errno
    assert c.answer(reply.data).ident == 9
    assert c.answer(after.data).errno is None


@pytest.mark.parametrize(
    "sent", [each[0] for each in (ANSWERED | REFUSED).values()], ids=list(ANSWERED) + list(REFUSED)
)
def test_who_wants_no_reply_gets_none(sent: bytes) -> None:
    silent = sent[:8] + struct.pack("<I", c.NO_REPLY) + sent[12:]
    assert only_event(opened(), silent) == Reply(b"")


def test_a_read_of_registers_is_its_owners() -> None:
    event = only_event(opened(), c.read(77, 0, 0x1FF8, 8))
    assert isinstance(event, ReadRegisters)
    assert (event.offset, event.size) == (0x1FF8, 8)
    assert c.answer(event.reply(b"12345678")) == c.Answer(77, c.READ, struct.pack("<QII", 0x1FF8, 0, 8) + b"12345678")


def test_a_write_to_registers_is_acknowledged_by_what_was_asked() -> None:
    event = only_event(opened(), c.write(77, 0, 0x4C, b"\1\0\0\0"))
    assert isinstance(event, WriteRegisters)
    assert event.writes == ((0x4C, b"\1\0\0\0"),)
    assert c.answer(event.reply) == c.Answer(77, c.WRITE, struct.pack("<QII", 0x4C, 0, 4))


def test_a_posted_write_is_not_acknowledged() -> None:
    assert only_event(opened(), c.write(77, 0, 8, b"\1", c.NO_REPLY)) == WriteRegisters(((8, b"\1"),), b"")


def test_several_writes_in_one_message() -> None:
    event = only_event(opened(), c.write_multi(5, [(0, 0x1000, b"12345678"), (0, 0x1008, b"ab"), (0, 0x4C, b"\1")]))
    assert isinstance(event, WriteRegisters)
    assert event.writes == ((0x1000, b"12345678"), (0x1008, b"ab"), (0x4C, b"\1"))
    assert c.answer(event.reply) == c.Answer(5, c.WRITE_MULTI, struct.pack("<Q", 3))


def test_several_writes_need_to_have_been_agreed_on() -> None:
    said = {"capabilities": {"max_msg_fds": 1}}
    assert answered(opened(said), c.write_multi(5, [(0, 8, b"\1")])).errno == c.ENOTSUP


def test_several_writes_that_move_the_registers() -> None:
    event = only_event(opened(), c.write_multi(5, [(7, 0x10, b"\0\0\0\xfe"), (0, 8, b"\1")], c.NO_REPLY))
    assert event == Move(0xFE000000, ((8, b"\1"),), b"")


def test_the_bar_tells_where_the_registers_are_until_a_reset() -> None:
    connection = opened()
    event = only_event(connection, c.write(6, 7, 0x10, (0xFEBF0000).to_bytes(4, "little")))
    assert isinstance(event, Move)
    assert (event.base, event.writes) == (0xFEBF0000, ())
    assert answered(connection, c.read(7, 7, 0x10, 4)).body[16:] == (0xFEBF0000).to_bytes(4, "little")
    reset = only_event(connection, c.message(8, c.RESET))
    assert isinstance(reset, Reset)
    assert c.answer(reset.head.reply()) == c.Answer(8, c.RESET, b"")
    assert connection.base == 0


def test_a_client_that_takes_no_descriptors_is_offered_no_memory() -> None:
    said = {"capabilities": {"max_msg_fds": 0}}
    assert answered(opened(said), c.region_info(9, 0, 64)).body == struct.pack("<IIIIQQ", 32, 3, 0, 0, 0x2000, 0)


def test_memory_that_cannot_be_mapped_is_not_offered() -> None:
    event = only_event(opened(mappable=False), c.region_info(9, 0, 64))
    assert isinstance(event, Reply)
    assert not event.descriptor
    assert c.answer(event.data).body == struct.pack("<IIIIQQ", 32, 3, 0, 0, 0x2000, 0)


def test_the_descriptor_goes_along_with_the_whole_answer_alone() -> None:
    connection = opened()
    with_descriptor = [
        index
        for index in range(9)
        for room in (32, 64)
        if (event := only_event(connection, c.region_info(9, index, room)))
        and isinstance(event, Reply)
        and event.descriptor
    ]
    assert with_descriptor == [0]
    unanswered = c.region_info(9, 0, 64)
    assert only_event(connection, unanswered[:8] + b"\x10\0\0\0" + unanswered[12:]) == Reply(b"")


# -- version


@pytest.mark.parametrize(
    ("said", "multiple"),
    [
        (c.QEMU, True),
        (None, False),
        ({}, False),
        ({"capabilities": {}}, False),
        ({"capabilities": {"write_multiple": 1, "max_msg_fds": "many"}}, False),
        ({"capabilities": {"write_multiple": False, "twin_socket": {"supported": True}}}, False),
    ],
)
def test_a_version_is_answered_by_a_subset_of_what_was_proposed(said: object, *, multiple: bool) -> None:
    event = only_event(Connection(), c.version(3, said, minor=9))
    assert isinstance(event, Reply)
    answer = c.answer(event.data)
    assert struct.unpack_from("<HH", answer.body) == (0, 0)
    assert answer.body.endswith(b"\0")
    capabilities = json.loads(answer.body[4:-1])["capabilities"]
    assert capabilities.pop("write_multiple", False) is multiple
    assert capabilities == {"max_msg_fds": 8, "max_data_xfer_size": 65536}


TEXTS = {
    "no end": b"{}",
    "no JSON": b"{\0",
    "no UTF-8": b'{"\xff":1}\0',
    "no object": b"[]\0",
    "no capabilities": b'{"capabilities":7}\0',
    "too deep": b"[" * 4000 + b"\0",
    "a number too long": b"1" * 4095 + b"\0",
    "too long": b'{"a":"' + b"a" * 5000 + b'"}\0',
}


@pytest.mark.parametrize(
    "sent",
    [
        c.version(3, major=1),
        c.message(3, c.VERSION, b"\0\0\0"),
        *(c.message(3, c.VERSION, bytes(4) + text) for text in TEXTS.values()),
        c.read(3, 7, 0, 4),
        c.message(3, c.RESET),
        c.write(3, 0, 0x4C, b"\1"),
        c.message(3, 99),
    ],
    ids=["major 1", "cut short", *TEXTS, "read", "reset", "write", "unknown"],
)
def test_who_does_not_begin_with_a_version_is_told_and_left(sent: bytes) -> None:
    connection = Connection()
    event = only_event(connection, sent + c.version(4))
    assert isinstance(event, Close)
    assert c.answer(event.data).errno == c.EINVAL
    assert events(connection, c.version(4)) == []


@pytest.mark.parametrize(
    "sent",
    [
        c.message(3, c.INFO, size=15),
        c.message(3, c.INFO, size=0),
        c.message(3, c.WRITE, size=16 + 16 + 65536 + 1),
        c.message(3, c.WRITE, size=0xFFFFFFFF),
        c.message(3, c.INFO, flags=0x1),
        c.message(3, c.INFO, flags=0x2F),
    ],
    ids=["below the header", "0", "above the cap", "4 GiB", "a reply", "no type"],
)
def test_a_header_that_cannot_be_true_ends_the_connection_as_soon_as_it_is_there(sent: bytes) -> None:
    connection = opened()
    assert events(connection, sent[:15]) == []
    event = only_event(connection, sent[15:16])
    assert isinstance(event, Close)
    assert event.data == b""
    assert events(connection, INFO) == []
    assert connection.freeze().received == b"", "nothing more is kept of such a client"


def test_the_longest_message_is_taken() -> None:
    assert answered(opened(), c.write(1, 0, 0, bytes(65536))).errno == c.EINVAL


# -- freezing


@pytest.mark.parametrize("sent", [INFO, c.write(9, 0, 8, b"\1\0\0\0"), c.write_multi(9, [(0, 8, b"\1")])])
def test_another_connection_goes_on_anywhere_in_a_message(sent: bytes) -> None:
    expected = only_event(opened(), sent)
    for at in range(len(sent)):
        first = opened()
        assert events(first, sent[:at]) == []
        assert only_event(Connection(first.freeze()), sent[at:]) == expected


def test_another_connection_finds_what_was_received_whole_and_not_fetched() -> None:
    first = opened()
    first.receive(INFO + c.read(10, 0, 0, 4) + INFO[:3])
    first.next_event()
    second = Connection(first.freeze())
    event = second.next_event()
    assert isinstance(event, ReadRegisters)
    assert event.head.ident == 10
    assert second.next_event() is None


def test_another_connection_has_the_same_config_space_and_agreement() -> None:
    first = opened({"capabilities": {"max_msg_fds": 0}})
    only_event(first, c.write(6, 7, 0x10, (0xFEBF0000).to_bytes(4, "little")))
    second = Connection(first.freeze())
    assert second.base == 0xFEBF0000
    assert len(answered(second, c.region_info(9, 0, 64)).body) == 32
    assert isinstance(only_event(Connection(Snapshot()), INFO), Close), "who has agreed on nothing has not"


# -- anything

PIECES = st.one_of(
    st.binary(max_size=64),
    st.sampled_from([*(each[0] for each in (ANSWERED | REFUSED).values()), *EVENTS]),
    st.builds(
        c.message,
        st.integers(0, 0xFFFF),
        st.integers(0, 20),
        st.binary(max_size=80),
        st.sampled_from([0, 0x10, 0x20]),
    ),
)


@pytest.mark.timeout(1200)  # nightly: 50 000 of them
@given(pieces=st.lists(PIECES, max_size=12), size=st.integers(1, 90), begun=st.booleans())
def test_whatever_comes_and_however_it_is_cut(pieces: list[bytes], size: int, *, begun: bool) -> None:
    stream = b"".join(pieces)
    whole, cut = (opened(), opened()) if begun else (Connection(), Connection())
    expected = events(whole, stream)
    found = [event for at in range(0, len(stream), size) for event in events(cut, stream[at : at + size])]
    assert found == expected
    assert cut.freeze() == whole.freeze()
    for event in expected:
        match event:
            case Reply(data) | Close(data) | WriteRegisters(_, data):
                assert len(c.answers(data)) <= 1
            case Move(base, _, data):
                assert base % 0x2000 == 0
                assert len(c.answers(data)) <= 1
            case ReadRegisters(_, offset, count):
                assert offset + count <= 0x2000
    for event in expected:
        if isinstance(event, WriteRegisters | Move):
            assert all(offset + len(data) <= 0x2000 for offset, data in event.writes)
