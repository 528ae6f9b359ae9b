"""The TPM 2.0 numbers that crbd itself has to know (TPM 2.0 Part 2, sections 6.5.2, 6.6.3 and 6.9).

The TPM's semantics live in the engine; here are only the tags that tell heads apart, the response codes crbd answers
with in the engine's stead, and the commands it sends or watches for.
"""

from __future__ import annotations

from enum import IntEnum


class Tag(IntEnum):
    """TPM_ST: structure tags of commands and responses (Part 2, 6.9)."""

    NO_SESSIONS = 0x8001
    SESSIONS = 0x8002


class ResponseCode(IntEnum):
    """TPM_RC (Part 2, 6.6.3)."""

    SUCCESS = 0x000
    FAILURE = 0x101
    INITIALIZE = 0x100
    COMMAND_SIZE = 0x142
    INSUFFICIENT = 0x09A
    BAD_TAG = 0x01E
    LOCALITY = 0x907
    RETRY = 0x922
    CANCELED = 0x909


class CommandCode(IntEnum):
    """TPM_CC (Part 2, 6.5.2), and one vendor command that swtpm knows."""

    STARTUP = 0x144
    SHUTDOWN = 0x145
    NV_DEFINE_SPACE = 0x12A
    READ_PUBLIC = 0x173
    GET_CAPABILITY = 0x17A
    GET_RANDOM = 0x17B
    READ_CLOCK = 0x181
    VENDOR_SET_LOCALITY = 0x20001000
    """swtpm's TPM2_CC_SET_LOCALITY (the Linux vTPM proxy's):

    a head and one locality byte; bit 29 marks a vendor command.
    """


class StartupType(IntEnum):
    """TPM_SU (Part 2, 6.10)."""

    CLEAR = 0
    STATE = 1
