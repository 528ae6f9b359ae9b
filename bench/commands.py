"""TPM 2.0 commands as bytes, built by hand, so that a benchmark's client costs next to nothing.

Everything is big-endian and starts with the ten-byte head `u16 tag, u32 size, u32 code` (TPM 2.0 Part 3, section 4).
Every builder returns one whole command. Whatever needs authorization is authorized with an empty password.
"""

from __future__ import annotations

import struct

HEAD = struct.Struct(">HII")
"""Head of a command (tag, size, command code) and of a response (tag, size, response code)."""

ST_NO_SESSIONS = 0x8001
ST_SESSIONS = 0x8002

RH_OWNER = 0x40000001
RH_NULL = 0x40000007
RS_PW = 0x40000009

ALG_SHA256 = 0x000B
ALG_NULL = 0x0010
ALG_RSASSA = 0x0014
ALG_ECDSA = 0x0018
ALG_ECC = 0x0023
ALG_RSA = 0x0001
ECC_NIST_P256 = 0x0003

RC_SUCCESS = 0x000
RC_INITIALIZE = 0x100
RC_CANCELED = 0x909

SHA256_SIZE = 32
"""Bytes of a SHA-256 digest."""

PASSWORD_AREA = struct.pack(">IIHBH", 9, RS_PW, 0, 0, 0)
"""Authorization area (size, one session): the empty password (Part 1, 19.4)."""

SIGNING_KEY = 0x00040472
"""TPMA_OBJECT: fixedTPM, fixedParent, sensitiveDataOrigin, userWithAuth, noDA, sign; not restricted."""

NV_ATTRIBUTES = 0x02060006
"""TPMA_NV: written and read by the owner or by the index's own (empty) password, no dictionary attack protection."""


def sized(data: bytes) -> bytes:
    """A TPM2B: `u16 size` and the bytes."""
    return struct.pack(">H", len(data)) + data


def plain(code: int, body: bytes = b"") -> bytes:
    """A command without sessions."""
    return HEAD.pack(ST_NO_SESSIONS, HEAD.size + len(body), code) + body


def authorized(code: int, handles: tuple[int, ...], body: bytes = b"") -> bytes:
    """A command whose first handle is authorized with the empty password."""
    rest = struct.pack(f">{len(handles)}I", *handles) + PASSWORD_AREA + body
    return HEAD.pack(ST_SESSIONS, HEAD.size + len(rest), code) + rest


def startup_clear() -> bytes:
    """TPM2_Startup(TPM_SU_CLEAR)."""
    return plain(0x144, b"\0\0")


def get_capability() -> bytes:
    """TPM2_GetCapability: the first eight fixed properties."""
    return plain(0x17A, struct.pack(">III", 6, 0x100, 8))


def get_random(count: int) -> bytes:
    """TPM2_GetRandom of `count` bytes."""
    return plain(0x17B, struct.pack(">H", count))


def read_clock() -> bytes:
    """TPM2_ReadClock."""
    return plain(0x181)


def hash_sha256(data: bytes) -> bytes:
    """TPM2_Hash of up to 1024 bytes."""
    return plain(0x17D, sized(data) + struct.pack(">HI", ALG_SHA256, RH_NULL))


def pcr_read(index: int) -> bytes:
    """TPM2_PCR_Read of one PCR (0-23) of the SHA-256 bank."""
    return plain(0x17E, struct.pack(">IHB", 1, ALG_SHA256, 3) + (1 << index).to_bytes(3, "little"))


def pcr_extend(index: int, digest: bytes) -> bytes:
    """TPM2_PCR_Extend of the SHA-256 bank; `digest` has 32 bytes."""
    return authorized(0x182, (index,), struct.pack(">IH", 1, ALG_SHA256) + digest)


def nv_define(index: int, size: int) -> bytes:
    """TPM2_NV_DefineSpace: an ordinary index of `size` bytes with `NV_ATTRIBUTES`."""
    public = struct.pack(">IHIHH", index, ALG_SHA256, NV_ATTRIBUTES, 0, size)
    return authorized(0x12A, (RH_OWNER,), sized(b"") + sized(public))


def nv_write(index: int, data: bytes) -> bytes:
    """TPM2_NV_Write of `data` at offset 0, authorized by the index itself."""
    return authorized(0x137, (index, index), sized(data) + b"\0\0")


def nv_read(index: int, size: int) -> bytes:
    """TPM2_NV_Read of `size` bytes from offset 0."""
    return authorized(0x14E, (index, index), struct.pack(">HH", size, 0))


def create_primary_ecc() -> bytes:
    """TPM2_CreatePrimary: a P-256 signing key under the owner; the scheme is chosen when it signs."""
    parameters = struct.pack(">HHHH", ALG_NULL, ALG_NULL, ECC_NIST_P256, ALG_NULL)
    return _create_primary(ALG_ECC, parameters, sized(b"") + sized(b""))


def create_primary_rsa(bits: int, unique: bytes = b"") -> bytes:
    """TPM2_CreatePrimary: an RSA signing key under the owner.

    A primary key follows from the hierarchy's seed and the template: another `unique` is another key, and another
    search for primes, which takes another time.
    """
    parameters = struct.pack(">HHHI", ALG_NULL, ALG_NULL, bits, 0)
    return _create_primary(ALG_RSA, parameters, sized(unique))


def _create_primary(algorithm: int, parameters: bytes, unique: bytes) -> bytes:
    public = struct.pack(">HHIH", algorithm, ALG_SHA256, SIGNING_KEY, 0) + parameters + unique
    sensitive = sized(b"") + sized(b"")
    return authorized(0x131, (RH_OWNER,), sized(sensitive) + sized(public) + sized(b"") + bytes(4))


def sign(handle: int, scheme: int, digest: bytes) -> bytes:
    """TPM2_Sign of a SHA-256 digest with `ALG_ECDSA` or `ALG_RSASSA`."""
    ticket = struct.pack(">HIH", 0x8024, RH_NULL, 0)
    return authorized(0x15D, (handle,), sized(digest) + struct.pack(">HH", scheme, ALG_SHA256) + ticket)


def start_hmac_session(nonce: bytes) -> bytes:
    """TPM2_StartAuthSession: an unbound, unsalted HMAC session; `nonce` has 16-32 bytes."""
    return plain(0x176, struct.pack(">II", RH_NULL, RH_NULL) + sized(nonce) + sized(b"") + b"\0\0\x10\0\x0b")


def flush_context(handle: int) -> bytes:
    """TPM2_FlushContext of a loaded key or session."""
    return plain(0x165, struct.pack(">I", handle))


def response_code(response: bytes) -> int:
    """The response code of a whole response."""
    return int.from_bytes(response[6:10], "big")


def first_handle(response: bytes) -> int:
    """The handle that a successful response returns right behind its head."""
    return int.from_bytes(response[10:14], "big")
