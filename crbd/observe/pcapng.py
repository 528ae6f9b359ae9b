"""TPM commands and responses as a pcapng file, in the form that swtpm 0.11 gives them (its pcap.c), for Wireshark.

One section, one Ethernet interface, and on it one TCP connection of 127.0.0.1 that never was: from a port between 50000
and 54999 to 2321, the port by which Wireshark knows TPM. Each command and each response is one segment; a handshake
comes before the first and a farewell after the last.

    section header           28 bytes   u32 0x0a0d0d0a, u32 28, u32 magic, u16 1, u16 0, u64 length (all ones: unknown),
                                        u32 28
    interface description    20 bytes   u32 1, u32 20, u16 1 (Ethernet), u16 0, u32 0 (no limit), u32 20
    enhanced packet          32 bytes   u32 6, u32 length, u32 interface 0, u64 microseconds (high half first),
                             + packet   u32 bytes captured, u32 bytes sent; the packet, padded to 4; u32 length

Blocks are little-endian (their own magic says so), headers inside packets big-endian. Source: the pcapng draft
(draft-ietf-opsawg-pcapng), RFC 791, RFC 9293. swtpm writes no flags into the segments that carry data, and a section
length of 0; here they have PSH and ACK, as Wireshark expects, and the length is unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntFlag
from struct import Struct

TPM_PORT = 2321
CLIENT_PORTS = range(50000, 55000)
MAX_PAYLOAD = 0xFFFF - 40
"""Bytes that one IPv4 packet has room for behind its headers; a longer command or response is cut."""

_SECTION = Struct("<IIIHHqI")
_INTERFACE = Struct("<IIHHII")
_PACKET = Struct("<IIIIIII")
_ETHERNET = bytes(12) + b"\x08\x00"
_IPV4 = Struct(">BBHHHBBHII")
_TCP = Struct(">HHIIBBHHH")
_LOOPBACK = 0x7F000001
_WORD = 1 << 32


class TcpFlag(IntFlag):
    """TCP's flags that occur here."""

    FIN = 1
    SYN = 2
    PSH = 8
    ACK = 16


_HEAD = _SECTION.pack(0x0A0D0D0A, _SECTION.size, 0x1A2B3C4D, 1, 0, -1, _SECTION.size) + _INTERFACE.pack(
    1, _INTERFACE.size, 1, 0, 0, _INTERFACE.size
)


@dataclass(slots=True)
class Conversation:
    """The connection that never was: what is to be written next, as bytes. `microseconds` count from 1970.

    `client_sequence` and `tpm_sequence` are TCP's, u32; a real client chooses them at random.
    """

    client_port: int
    client_sequence: int
    tpm_sequence: int
    checksums: bool = False
    """Whether IP and TCP checksums are computed; they are 0 otherwise, as where network hardware computes them."""

    def begin(self, microseconds: int) -> bytes:
        """The file's first blocks, and the handshake."""
        return _HEAD + self._exchange(TcpFlag.SYN, microseconds)

    def end(self, microseconds: int) -> bytes:
        """The farewell."""
        return self._exchange(TcpFlag.FIN, microseconds)

    def command(self, data: bytes, microseconds: int) -> bytes:
        """A command on its way to the TPM."""
        return self._said(data, microseconds, to_tpm=True)

    def response(self, data: bytes, microseconds: int) -> bytes:
        """A response on its way to the client."""
        return self._said(data, microseconds, to_tpm=False)

    def _exchange(self, flag: TcpFlag, microseconds: int) -> bytes:
        first = self._block(b"", flag, microseconds, to_tpm=True)
        self.client_sequence = (self.client_sequence + 1) % _WORD
        second = self._block(b"", flag | TcpFlag.ACK, microseconds, to_tpm=False)
        self.tpm_sequence = (self.tpm_sequence + 1) % _WORD
        return first + second + self._block(b"", TcpFlag.ACK, microseconds, to_tpm=True)

    def _said(self, data: bytes, microseconds: int, *, to_tpm: bool) -> bytes:
        block = self._block(data[:MAX_PAYLOAD], TcpFlag.PSH | TcpFlag.ACK, microseconds, to_tpm=to_tpm)
        if to_tpm:
            self.client_sequence = (self.client_sequence + len(data[:MAX_PAYLOAD])) % _WORD
        else:
            self.tpm_sequence = (self.tpm_sequence + len(data[:MAX_PAYLOAD])) % _WORD
        return block

    def _block(self, data: bytes, flags: TcpFlag, microseconds: int, *, to_tpm: bool) -> bytes:
        packet = _ETHERNET + self._ip_packet(data, flags, to_tpm=to_tpm)
        padding = bytes(-len(packet) % 4)
        length = _PACKET.size + len(packet) + len(padding) + 4
        high, low = divmod(microseconds, _WORD)
        head = _PACKET.pack(6, length, 0, high, low, len(packet), len(packet))
        return head + packet + padding + length.to_bytes(4, "little")

    def _ip_packet(self, data: bytes, flags: TcpFlag, *, to_tpm: bool) -> bytes:
        ports = (self.client_port, TPM_PORT) if to_tpm else (TPM_PORT, self.client_port)
        mine, theirs = self.client_sequence, self.tpm_sequence
        if not to_tpm:
            mine, theirs = theirs, mine
        acknowledged = 0 if flags is TcpFlag.SYN else theirs
        length = _IPV4.size + _TCP.size + len(data)

        def tcp(checksum: int) -> bytes:
            return _TCP.pack(*ports, mine, acknowledged, _TCP.size // 4 << 4, flags, 0xFFC4, checksum, 0)

        def ip(checksum: int) -> bytes:
            return _IPV4.pack(0x45, 0x10, length, 0x069B, 0x4000, 64, 6, checksum, _LOOPBACK, _LOOPBACK)

        if not self.checksums:
            return ip(0) + tcp(0) + data
        pseudo = Struct(">IIHH").pack(_LOOPBACK, _LOOPBACK, 6, length - _IPV4.size)
        return ip(_checksum(ip(0))) + tcp(_checksum(pseudo + tcp(0) + data)) + data


def _checksum(data: bytes) -> int:
    """RFC 1071."""
    data += bytes(len(data) % 2)
    total = sum(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
