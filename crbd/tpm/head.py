"""Command and response heads (TPM 2.0 Part 1, section 18): `u16 tag, u32 size, u32 code`, big-endian, ten bytes.

`size` counts the head. The third field is a command code in a command and a response code in a response.
"""

from __future__ import annotations

from struct import Struct

from crbd.tpm.codes import CommandCode, ResponseCode, StartupType, Tag

HEAD_SIZE = 10
"""Bytes in a command or response head."""

_HEAD = Struct(">HII")
_STARTUP_TYPE = Struct(">H")


def command_code(command: bytes) -> int | None:
    """The command code of a whole or truncated command; None where the head is not all there."""
    if len(command) < HEAD_SIZE:
        return None
    return int.from_bytes(command[6:10], "big")


def response_code(response: bytes) -> int | None:
    """The response code of a response; None where the head is not all there."""
    return command_code(response)


def error_response(code: int) -> bytes:
    """A whole response that carries nothing but `code` (Part 3, 5.2: tag TPM_ST_NO_SESSIONS)."""
    return _HEAD.pack(Tag.NO_SESSIONS, HEAD_SIZE, code)


def success_response() -> bytes:
    """A whole response with TPM_RC_SUCCESS and no parameters."""
    return error_response(ResponseCode.SUCCESS)


def startup_command(startup: StartupType) -> bytes:
    """TPM2_Startup (Part 3, 9.3)."""
    return _with_startup_type(CommandCode.STARTUP, startup)


def shutdown_command(startup: StartupType) -> bytes:
    """TPM2_Shutdown (Part 3, 9.4)."""
    return _with_startup_type(CommandCode.SHUTDOWN, startup)


def _with_startup_type(code: CommandCode, startup: StartupType) -> bytes:
    return _HEAD.pack(Tag.NO_SESSIONS, HEAD_SIZE + 2, code) + _STARTUP_TYPE.pack(startup)
