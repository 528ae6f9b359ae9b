"""Commands that crbd asks a TPM for its own purposes, and the fields of their answers (TPM 2.0 Part 3; big-endian).

Answers come from the TPM that this process runs; one that is not as Part 3 says is a WireError all the same.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from crbd.errors import WireError
from crbd.tpm.codes import CommandCode, ResponseCode, Tag
from crbd.tpm.head import HEAD_SIZE, response_code

CAP_HANDLES: Final = 1
CAP_TPM_PROPERTIES: Final = 6
"""TPM_CAP (Part 2, 6.12)."""
PT_NV_INDEX_MAX: Final = 0x117
PT_HR_NV_INDEX: Final = 0x202
PT_HR_PERSISTENT: Final = 0x208
PT_HR_PERSISTENT_AVAIL: Final = 0x209
"""TPM_PT (Part 2, 6.13)."""
PERSISTENT_FIRST: Final = 0x81000000
RH_PLATFORM: Final = 0x4000000C
NV_SPACE: Final = 0x14B
"""TPM_RC_NV_SPACE."""
NV_DEFINED: Final = 0x14C
"""TPM_RC_NV_DEFINED."""

_HEAD = Struct(">HII")
_THREE = Struct(">III")
_PAIR = Struct(">II")
_EMPTY_PASSWORD = Struct(">IIHBH").pack(9, 0x40000009, 0, 0, 0)
"""An authorization area with one session: TPM_RS_PW and an empty password."""
_NV_PUBLIC = Struct(">HIHIHH")
_SHA256: Final = 0x000B
_PLATFORM_DATA: Final = 1 << 0 | 1 << 16 | 1 << 25 | 1 << 30
"""TPMA_NV: PPWRITE, PPREAD, NO_DA, PLATFORMCREATE (Part 2, 13.4)."""


def get_capability(capability: int, first: int, count: int) -> bytes:
    """TPM2_GetCapability (Part 3, 30.2): `count` of them from `first` on."""
    return _command(Tag.NO_SESSIONS, CommandCode.GET_CAPABILITY, _THREE.pack(capability, first, count))


def handles_in(response: bytes) -> tuple[int, ...]:
    """What `get_capability(CAP_HANDLES, ...)` was answered with. Raises WireError."""
    return tuple(value for (value,) in Struct(">I").iter_unpack(_listed(response, CAP_HANDLES, 4)))


def properties_in(response: bytes) -> dict[int, int]:
    """What `get_capability(CAP_TPM_PROPERTIES, ...)` was answered with. Raises WireError."""
    return dict(_PAIR.iter_unpack(_listed(response, CAP_TPM_PROPERTIES, 8)))


def read_public(handle: int) -> bytes:
    """TPM2_ReadPublic (Part 3, 12.4)."""
    return _command(Tag.NO_SESSIONS, CommandCode.READ_PUBLIC, handle.to_bytes(4, "big"))


def public_area_in(response: bytes) -> bytes:
    """The TPMT_PUBLIC that `read_public` was answered with. Raises WireError."""
    body = _answered(response)
    area = body[2 : 2 + int.from_bytes(body[:2], "big")]
    if len(body) < 2 or len(area) != int.from_bytes(body[:2], "big"):
        raise WireError("TPM2_ReadPublic's answer is cut short")
    return area


def define_space(index: int, size: int) -> bytes:
    """TPM2_NV_DefineSpace (Part 3, 31.3) of the platform, whose authorization is empty: `size` bytes at `index`."""
    public = _NV_PUBLIC.pack(_NV_PUBLIC.size - 2, index, _SHA256, _PLATFORM_DATA, 0, size)
    body = RH_PLATFORM.to_bytes(4, "big") + _EMPTY_PASSWORD + bytes(2) + public
    return _command(Tag.SESSIONS, CommandCode.NV_DEFINE_SPACE, body)


def _command(tag: Tag, code: CommandCode, body: bytes) -> bytes:
    return _HEAD.pack(tag, HEAD_SIZE + len(body), code) + body


def _listed(response: bytes, capability: int, size: int) -> bytes:
    """The elements, of `size` bytes each, of a TPMS_CAPABILITY_DATA (Part 2, 10.10.1)."""
    body = _answered(response)
    if len(body) < 9 or _PAIR.unpack_from(body, 1)[0] != capability:
        raise WireError("TPM2_GetCapability's answer is to another question")
    elements = body[9:]
    if len(elements) != size * _PAIR.unpack_from(body, 1)[1]:
        raise WireError("TPM2_GetCapability's answer is cut short")
    return elements


def _answered(response: bytes) -> bytes:
    code = response_code(response)
    if code != ResponseCode.SUCCESS:
        raise WireError(f"the TPM answers with 0x{code or 0:x}")
    return response[HEAD_SIZE:]
