"""TPM commands as bytes, and their answers taken apart (TPM 2.0 Part 3; big-endian)."""

from __future__ import annotations

import struct

SUCCESS = 0x000
INITIALIZE = 0x100
FAILURE = 0x101
COMMAND_SIZE = 0x142
LOCALITY = 0x907
CANCELED = 0x909

OWNER = 0x40000001
PASSWORD = struct.pack(">IHBH", 0x40000009, 0, 1, 0)
SHA256 = 0x000B
NV_INDEX = 0x01500000


def command(code: int, parameters: bytes = b"") -> bytes:
    return struct.pack(">HII", 0x8001, 10 + len(parameters), code) + parameters


def authorized(code: int, handles: tuple[int, ...], parameters: bytes, sessions: bytes = PASSWORD) -> bytes:
    body = b"".join(struct.pack(">I", handle) for handle in handles)
    body += struct.pack(">I", len(sessions)) + sessions + parameters
    return struct.pack(">HII", 0x8002, 10 + len(body), code) + body


def sized(data: bytes) -> bytes:
    return struct.pack(">H", len(data)) + data


STARTUP_CLEAR = command(0x144, b"\0\0")
STARTUP_STATE = command(0x144, b"\0\1")
SHUTDOWN_CLEAR = command(0x145, b"\0\0")
SHUTDOWN_STATE = command(0x145, b"\0\1")
GET_RANDOM = command(0x17B, b"\0\x10")


def pcr_extend(number: int, digest: bytes) -> bytes:
    return authorized(0x182, (number,), struct.pack(">IH", 1, SHA256) + digest)


def pcr_read(number: int) -> bytes:
    return command(0x17E, struct.pack(">IHB", 1, SHA256, 3) + (1 << number).to_bytes(3, "little"))


def pcr_value(answer: bytes) -> bytes:
    """The one digest at the end of an answer to `pcr_read`."""
    assert code(answer) == SUCCESS, answer.hex()
    return answer[-32:]


def nv_define(size: int, index: int = NV_INDEX) -> bytes:
    """An ordinary index that owner and its (empty) password may read and write."""
    public = struct.pack(">IHI", index, SHA256, 0x02060006) + sized(b"") + struct.pack(">H", size)
    return authorized(0x12A, (OWNER,), sized(b"") + sized(public))


def nv_write(data: bytes, index: int = NV_INDEX) -> bytes:
    return authorized(0x137, (OWNER, index), sized(data) + b"\0\0")


def nv_read(size: int, index: int = NV_INDEX) -> bytes:
    return authorized(0x14E, (OWNER, index), struct.pack(">HH", size, 0))


def nv_value(answer: bytes) -> bytes:
    """What an answer to `nv_read` holds."""
    assert code(answer) == SUCCESS, answer.hex()
    return answer[16:-5]


def create_primary(public: bytes) -> bytes:
    return authorized(
        0x131, (OWNER,), sized(sized(b"") + sized(b"")) + sized(public) + sized(b"") + struct.pack(">I", 0)
    )


SIGNING_ATTRIBUTES = 0x00040072
ECC_P256 = struct.pack(">HHIH", 0x23, SHA256, SIGNING_ATTRIBUTES, 0) + struct.pack(
    ">HHHHHHH", 0x10, 0x18, SHA256, 0x03, 0x10, 0, 0
)
"""TPMT_PUBLIC of a P-256 ECDSA signing key."""


def rsa_3072(unique: bytes) -> bytes:
    """TPMT_PUBLIC of an RSA-3072 signing key; another `unique` makes another primary key of the same seed."""
    head = struct.pack(">HHIH", 0x01, SHA256, SIGNING_ATTRIBUTES, 0)
    return head + struct.pack(">HHHHI", 0x10, 0x14, SHA256, 3072, 0) + sized(unique)


def start_session(kind: int, nonce: bytes = b"\1" * 16, symmetric: bytes = b"\0\x10") -> bytes:
    """TPM2_StartAuthSession, unbound and unsalted. `kind`: 0 HMAC, 1 policy. `symmetric`: a TPMT_SYM_DEF."""
    null = 0x40000007
    return command(
        0x176, struct.pack(">II", null, null) + sized(nonce) + sized(b"") + bytes([kind]) + symmetric + b"\0\x0b"
    )


def code(answer: bytes) -> int:
    """The response code of a well-formed answer."""
    assert len(answer) >= 10
    tag, size, result = struct.unpack_from(">HII", answer)
    assert tag in (0x8001, 0x8002)
    assert size == len(answer)
    return int(result)
