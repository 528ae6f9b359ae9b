"""The pcapng form: every block taken apart again, by hand."""

from __future__ import annotations

from struct import unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.observe.pcapng import MAX_PAYLOAD, TPM_PORT, Conversation, TcpFlag

PORT = 50123
NOW = 0x0005_1234_8765_4321
COMMAND = bytes.fromhex("80010000000c0000017b0010")


def blocks_of(data: bytes) -> list[bytes]:
    """Cut at the lengths that stand at both ends of each block."""
    blocks = []
    at = 0
    while at < len(data):
        length = unpack_from("<I", data, at + 4)[0]
        assert length % 4 == 0
        assert unpack_from("<I", data, at + length - 4)[0] == length
        blocks.append(data[at : at + length])
        at += length
    assert at == len(data)
    return blocks


def packet_of(block: bytes) -> bytes:
    """An enhanced packet block's packet."""
    kind, _, interface, high, low, captured, original = unpack_from("<IIIIIII", block)
    assert (kind, interface, high << 32 | low, captured) == (6, 0, NOW, original)
    return block[28 : 28 + captured]


def segment_of(block: bytes) -> tuple[bool, int, int, int, bytes]:
    """Whether it goes to the TPM, sequence number, acknowledgement, flags, data."""
    packet = packet_of(block)
    assert packet[12:14] == b"\x08\x00"
    assert packet[14] == 0x45
    assert unpack_from(">H", packet, 16)[0] == len(packet) - 14
    assert packet[26:34] == bytes((127, 0, 0, 1)) * 2
    source, target, sequence, acknowledged, offset, flags = unpack_from(">HHIIBB", packet, 34)
    assert {source, target} == {PORT, TPM_PORT}
    assert offset == 0x50
    return target == TPM_PORT, sequence, acknowledged, flags, packet[54:]


def test_a_whole_file() -> None:
    """The sequence numbers pass the end of 32 bits on the way."""
    talk = Conversation(PORT, 0xFFFFFFFA, 2000)
    data = talk.begin(NOW) + talk.command(COMMAND, NOW) + talk.response(b"answer", NOW) + talk.end(NOW)
    section, interface, *packets = blocks_of(data)
    assert section[:12] == bytes.fromhex("0a0d0d0a 1c000000 4d3c2b1a")
    assert (len(section), len(interface)) == (28, 20)
    assert interface[8:10] == b"\1\0"
    ack, push = TcpFlag.ACK, TcpFlag.ACK | TcpFlag.PSH
    assert [segment_of(block) for block in packets] == [
        (True, 0xFFFFFFFA, 0, TcpFlag.SYN, b""),
        (False, 2000, 0xFFFFFFFB, TcpFlag.SYN | ack, b""),
        (True, 0xFFFFFFFB, 2001, ack, b""),
        (True, 0xFFFFFFFB, 2001, push, COMMAND),
        (False, 2001, 7, push, b"answer"),
        (True, 7, 2007, TcpFlag.FIN, b""),
        (False, 2007, 8, TcpFlag.FIN | ack, b""),
        (True, 8, 2008, ack, b""),
    ]


def _sums_to_ones(data: bytes) -> bool:
    """RFC 1071: what holds a right checksum adds up to all ones."""
    data += bytes(len(data) % 2)
    total: int = sum(unpack_from(f">{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total == 0xFFFF


@given(st.binary(min_size=0, max_size=100))
def test_checksums(data: bytes) -> None:
    packet = packet_of(Conversation(PORT, 1, 2, checksums=True).command(data, NOW))
    assert _sums_to_ones(packet[14:34])
    length = len(packet) - 34
    assert _sums_to_ones(packet[26:34] + bytes((0, 6)) + length.to_bytes(2, "big") + packet[34:])
    plain = packet_of(Conversation(PORT, 1, 2).command(data, NOW))
    assert (plain[24:26], plain[50:52]) == (bytes(2), bytes(2))


@pytest.mark.parametrize("size", [MAX_PAYLOAD, MAX_PAYLOAD + 1])
def test_what_no_packet_has_room_for_is_cut(size: int) -> None:
    talk = Conversation(PORT, 0, 0)
    assert len(segment_of(talk.response(bytes(size), NOW))[4]) == MAX_PAYLOAD
    assert segment_of(talk.response(b"x", NOW))[1] == MAX_PAYLOAD
