"""What `swtpm_bios` sends: the commands of a machine's start as values, for a TPM 2.0 and for a TPM 1.2.

Commands of the TPM 1.2 are those of TPM Main Part 3 and of the TCG PC Client specification (TSC_PhysicalPresence);
those of the TPM 2.0 stand in TPM 2.0 Part 3. All numbers are big-endian.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from struct import pack

PASSWORD_SIZE = 20
"""Bytes of the random platform password."""

SHORT = 20.0
LONG = 600.0
"""Seconds that a command may take: most; one that tests the whole TPM. Ten times the TPM's own, for slow machines."""


class Startup(Enum):
    """How the TPM begins: the TPM 1.2's TPM_STARTUP_TYPE and the TPM 2.0's TPM_SU; None sends no command."""

    CLEAR = (1, 0)
    STATE = (2, 1)
    DEACTIVATED = (3, None)
    NONE = (None, None)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    startup: Startup = Startup.CLEAR
    more: bool = True
    """Set physical presence, enable and activate (TPM 1.2)."""
    self_test: bool = False
    ensure_activated: bool = False
    """See whether the TPM 1.2 needs a reset to be active."""
    give_up: bool = False
    """Give up physical presence (1.2), or lock the platform hierarchy behind a random password (2.0)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One command. `name` is what a message about its refusal calls it."""

    name: str
    command: bytes
    seconds: float = SHORT
    tells_flags: bool = False
    """The response holds the TPM 1.2's permanent flags."""
    activates: bool = False
    """Activates the TPM 1.2, which takes effect at its next reset."""


def tpm2_steps(wanted: Wanted, password: bytes) -> Iterator[Step]:
    """The commands for a TPM 2.0. `password` (PASSWORD_SIZE random bytes) is for `give_up`."""
    startup_type = wanted.startup.value[1]
    if startup_type is not None:
        yield Step("TPM2_Startup", _command(0x8001, 0x144, pack(">H", startup_type)))
    if wanted.self_test:
        sha256 = 0x000B
        yield Step("TPM2_IncrementalSelfTest", _command(0x8001, 0x142, pack(">IH", 1, sha256)))
    if wanted.give_up:
        platform, password_session = 0x4000000C, 0x40000009
        continue_session = 1
        authorization = pack(">IHBH", password_session, 0, continue_session, 0)
        body = pack(">II", platform, len(authorization)) + authorization + pack(">H", len(password)) + password
        yield Step("TPM2_HierarchyChangeAuth", _command(0x8002, 0x129, body))


def tpm12_steps(wanted: Wanted) -> Iterator[Step]:
    """The commands for a TPM 1.2."""
    startup_type = wanted.startup.value[0]
    if startup_type is not None:
        yield Step(f"TPM_Startup(0x{startup_type:02x})", _tpm12(0x99, pack(">H", startup_type)))
    if wanted.more:
        yield _presence("CMD_ENABLE", 0x20)
        yield _presence("PRESENT", 0x08)
        if wanted.ensure_activated:
            flags, permanent = 4, 0x108
            yield Step("TPM_GetCapability()", _tpm12(0x65, pack(">III", flags, 4, permanent)), tells_flags=True)
        yield Step("TPM_PhysicalEnable", _tpm12(0x6F))
        yield Step("TPM_PhysicalSetDeactivated", _tpm12(0x72, b"\0"), activates=True)
    if wanted.self_test:
        yield Step("TPM_ContinueSelfTest", _tpm12(0x53), LONG)
    if wanted.give_up:
        yield _presence("CMD_ENABLE", 0x20)
        yield _presence("NOT_PRESENT|LOCK", 0x10 | 0x04)


def is_deactivated(response: bytes) -> bool:
    """Whether TPM_GetCapability's answer says that the TPM 1.2 is deactivated.

    `u32 size, u16 tag` and one byte for each of TPM_PERMANENT_FLAGS follow the head; the third is `deactivated`.
    """
    flags = response[16:]
    return len(flags) > 2 and flags[2] != 0


def _presence(name: str, value: int) -> Step:
    return Step(f"TSC_PhysicalPresence({name})", _tpm12(0x4000000A, pack(">H", value)))


def _tpm12(ordinal: int, body: bytes = b"") -> bytes:
    return _command(0x00C1, ordinal, body)


def _command(tag: int, code: int, body: bytes) -> bytes:
    return pack(">HII", tag, 10 + len(body), code) + body
