"""A very small TPM 2.0 without secrets: what the fake engine runs where no script tells it what to answer.

It knows TPM2_Startup, _Shutdown, _SelfTest, _GetRandom, _PCR_Extend, _PCR_Read, _NV_DefineSpace, _NV_UndefineSpace,
_NV_Write and _NV_Read (Part 3), one bank (SHA-256) of 24 PCRs, and sessions that are a password which it does not
check. Errors are those that libtpms gives, in the order it finds them. Big-endian throughout.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Final

NO_SESSIONS: Final = 0x8001
SESSIONS: Final = 0x8002

SUCCESS: Final = 0x000
BAD_TAG: Final = 0x084  # libtpms: TPM_RC_VALUE of the tag, not TPM_RC_BAD_TAG
SIZE: Final = 0x095
INSUFFICIENT: Final = 0x09A
INITIALIZE: Final = 0x100
FAILURE: Final = 0x101
AUTH_MISSING: Final = 0x125
COMMAND_SIZE: Final = 0x142
COMMAND_CODE: Final = 0x143
NV_RANGE: Final = 0x146
NV_UNINITIALIZED: Final = 0x14A
NV_DEFINED: Final = 0x14C
VALUE_OF_HANDLE_1: Final = 0x184
NO_HANDLE_2: Final = 0x28B
VALUE_OF_PARAMETER_1: Final = 0x1C4
INSUFFICIENT_PARAMETER_1: Final = 0x1DA
LOCALITY: Final = 0x907
CANCELED: Final = 0x909

_SHA256: Final = 0x000B
_PASSWORD: Final = 0x40000009
_LARGEST_RANDOM: Final = 64
_MOST_DIGESTS: Final = 8
_PCR_COUNT: Final = 24
_ZERO: Final = bytes(32)
_ONES: Final = b"\xff" * 32
_DRTM_PCRS: Final = range(17, 23)
_H_CRTM_PCR: Final = 0
_D_RTM_PCR: Final = 17
# PC Client Platform TPM Profile: which localities may extend which of the PCRs that not every locality may.
_EXTENDERS: Final = {17: {2, 3, 4}, 18: {2, 3, 4}, 19: {2, 3}, 20: {1, 2, 3}, 21: {2}, 22: {2}}


def response(code: int, body: bytes = b"", tag: int = NO_SESSIONS) -> bytes:
    """A whole response with its head."""
    return struct.pack(">HII", tag, 10 + len(body), code) + body


class CommandError(Exception):
    """Ends a command with a response code other than success."""

    def __init__(self, code: int) -> None:
        super().__init__(hex(code))
        self.code = code


class _Cursor:
    """Takes a command apart. What is not there raises CommandError(`missing`)."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0
        self.missing = INSUFFICIENT

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, size: int) -> bytes:
        if self.left < size:
            raise CommandError(self.missing)
        self._at += size
        return self._data[self._at - size : self._at]

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2))

    def u32(self) -> int:
        return int.from_bytes(self.take(4))

    def sized(self) -> bytes:
        return self.take(self.u16())

    def end(self) -> None:
        if self.left:
            raise CommandError(SIZE)


def _fresh_pcrs() -> list[bytes]:
    return [_ONES if number in _DRTM_PCRS else _ZERO for number in range(_PCR_COUNT)]


@dataclass(slots=True)
class NvIndex:
    """An NV index: its size in bytes, and as much as was ever written, None before."""

    size: int
    data: bytes | None = None


@dataclass(slots=True)
class Permanent:
    """What makes this TPM this TPM. `saved_pcrs` is what TPM2_Shutdown(STATE) kept for TPM2_Startup(STATE)."""

    seed: bytes = field(default_factory=lambda: os.urandom(16))
    startups: int = 0
    nv: dict[int, NvIndex] = field(default_factory=dict)
    saved_pcrs: list[bytes] | None = None


@dataclass(slots=True)
class Volatile:
    """What a running TPM holds beside; `seed` says of which."""

    seed: bytes
    started: bool = False
    drtm: bool = False
    pcr_updates: int = 0
    pcrs: list[bytes] = field(default_factory=_fresh_pcrs)


class FakeTpm:
    """A TPM from power-on on. `changed`: the permanent state is another than when this was last set to False."""

    def __init__(self, permanent: Permanent, volatile: Volatile | None = None) -> None:
        self.permanent = permanent
        self.volatile = volatile or Volatile(permanent.seed)
        self.changed = False
        self._sequence: bytearray | None = None

    def run(self, command: bytes, locality: int, largest: int) -> bytes:
        """The response to `command`, which is an error of its own above `largest` bytes."""
        self._sequence = None
        try:
            return self._run(_Cursor(command), len(command), locality, largest)
        except CommandError as error:
            return response(error.code)

    def _run(self, cursor: _Cursor, size: int, locality: int, largest: int) -> bytes:
        tag = cursor.u16()
        if tag not in (NO_SESSIONS, SESSIONS):
            raise CommandError(BAD_TAG)
        if cursor.u32() != size or size > largest:
            raise CommandError(COMMAND_SIZE)
        known = _COMMANDS.get(cursor.u32())
        if known is None:
            raise CommandError(COMMAND_CODE)
        if self.volatile.started == (known.action is FakeTpm._startup):
            raise CommandError(INITIALIZE)
        handles = [cursor.u32() for _ in range(known.handles)]
        if tag == SESSIONS:
            _skip_sessions(_Cursor(cursor.take(cursor.u32())))
        elif known.authorized:
            raise CommandError(AUTH_MISSING)
        cursor.missing = INSUFFICIENT_PARAMETER_1
        body = known.action(self, handles, cursor, locality)
        if tag == SESSIONS:
            body = struct.pack(">I", len(body)) + body + b"\0\0\1\0\0"
        return response(SUCCESS, body, tag)

    def _startup(self, _handles: list[int], cursor: _Cursor, locality: int) -> bytes:
        kind = cursor.u16()
        cursor.end()
        if locality not in (0, 3):
            raise CommandError(LOCALITY)
        saved = self.permanent.saved_pcrs
        if kind > 1 or (kind == 1 and saved is None):
            raise CommandError(VALUE_OF_PARAMETER_1)
        pcrs = list(saved) if kind == 1 and saved else _fresh_pcrs()
        if self.volatile.drtm:
            pcrs[_H_CRTM_PCR] = self.volatile.pcrs[_H_CRTM_PCR]
        elif kind == 0:
            pcrs[0] = bytes(31) + bytes([locality])
        self.volatile.pcrs = pcrs
        self.volatile.started = True
        self.permanent.startups += 1
        self.permanent.saved_pcrs = None
        self.changed = True
        return b""

    def _shutdown(self, _handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        kind = cursor.u16()
        cursor.end()
        if kind > 1:
            raise CommandError(VALUE_OF_PARAMETER_1)
        self.permanent.saved_pcrs = list(self.volatile.pcrs) if kind == 1 else None
        self.changed = True
        return b""

    def _self_test(self, _handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        cursor.u8()
        cursor.end()
        return b""

    def _get_random(self, _handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        size = min(cursor.u16(), _LARGEST_RANDOM)
        cursor.end()
        return struct.pack(">H", size) + os.urandom(size)

    def _pcr_extend(self, handles: list[int], cursor: _Cursor, locality: int) -> bytes:
        (number,) = handles
        digests = [(cursor.u16(), cursor.take(32)) for _ in range(cursor.u32())]
        cursor.end()
        if number >= _PCR_COUNT:
            raise CommandError(VALUE_OF_HANDLE_1)
        if any(algorithm != _SHA256 for algorithm, _ in digests):
            raise CommandError(VALUE_OF_PARAMETER_1)
        if number in _EXTENDERS and locality not in _EXTENDERS[number]:
            raise CommandError(LOCALITY)
        for _, digest in digests:
            self._extend(number, digest)
        return b""

    def _extend(self, number: int, digest: bytes) -> None:
        self.volatile.pcrs[number] = hashlib.sha256(self.volatile.pcrs[number] + digest).digest()
        self.volatile.pcr_updates += 1

    def _pcr_read(self, _handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        if (cursor.u32(), cursor.u16(), cursor.u8()) != (1, _SHA256, 3):
            raise CommandError(VALUE_OF_PARAMETER_1)
        wanted = int.from_bytes(cursor.take(3), "little")
        cursor.end()
        numbers = [number for number in range(_PCR_COUNT) if wanted >> number & 1][:_MOST_DIGESTS]
        told = sum(1 << number for number in numbers).to_bytes(3, "little")
        head = struct.pack(">IIHB", self.volatile.pcr_updates, 1, _SHA256, 3) + told + struct.pack(">I", len(numbers))
        return head + b"".join(b"\0\x20" + self.volatile.pcrs[number] for number in numbers)

    def _nv_define_space(self, _handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        cursor.sized()
        public = _Cursor(cursor.sized())
        cursor.end()
        index = public.u32()
        public.take(6)
        public.sized()
        size = public.u16()
        if index in self.permanent.nv:
            raise CommandError(NV_DEFINED)
        self.permanent.nv[index] = NvIndex(size)
        self.changed = True
        return b""

    def _nv_undefine_space(self, handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        cursor.end()
        self._index(handles)
        del self.permanent.nv[handles[1]]
        self.changed = True
        return b""

    def _nv_write(self, handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        data, offset = cursor.sized(), cursor.u16()
        cursor.end()
        index = self._index(handles)
        if offset + len(data) > index.size:
            raise CommandError(NV_RANGE)
        before = index.data or b"\xff" * index.size
        index.data = before[:offset] + data + before[offset + len(data) :]
        self.changed = True
        return b""

    def _nv_read(self, handles: list[int], cursor: _Cursor, _locality: int) -> bytes:
        size, offset = cursor.u16(), cursor.u16()
        cursor.end()
        index = self._index(handles)
        if index.data is None:
            raise CommandError(NV_UNINITIALIZED)
        if offset + size > index.size:
            raise CommandError(NV_RANGE)
        return struct.pack(">H", size) + index.data[offset : offset + size]

    def _index(self, handles: list[int]) -> NvIndex:
        found = self.permanent.nv.get(handles[1])
        if found is None:
            raise CommandError(NO_HANDLE_2)
        return found

    # The locality-4 hash sequence: any command ends it without effect.

    def hash_start(self) -> None:
        """_TPM_Hash_Start."""
        self._sequence = bytearray()

    def hash_data(self, data: bytes) -> None:
        """_TPM_Hash_Data: without effect outside a sequence."""
        if self._sequence is not None:
            self._sequence += data

    def hash_end(self) -> None:
        """_TPM_Hash_End: into PCR 17 of a started TPM, into PCR 0 before TPM2_Startup (an H-CRTM)."""
        if self._sequence is None:
            return
        digest = hashlib.sha256(self._sequence).digest()
        self._sequence = None
        if self.volatile.started:
            for number in _DRTM_PCRS:
                self.volatile.pcrs[number] = _ZERO
            self._extend(_D_RTM_PCR, digest)
        else:
            self.volatile.drtm = True
            self.volatile.pcrs[_H_CRTM_PCR] = bytes(31) + b"\4"
            self._extend(_H_CRTM_PCR, digest)


def _skip_sessions(area: _Cursor) -> None:
    while area.left:
        if area.u32() != _PASSWORD:
            raise CommandError(VALUE_OF_HANDLE_1)
        area.sized()
        area.u8()
        area.sized()


@dataclass(frozen=True, slots=True)
class _Command:
    action: Callable[[FakeTpm, list[int], _Cursor, int], bytes]
    handles: int = 0
    authorized: bool = False


_COMMANDS: Final = {
    0x122: _Command(FakeTpm._nv_undefine_space, 2, authorized=True),
    0x12A: _Command(FakeTpm._nv_define_space, 1, authorized=True),
    0x137: _Command(FakeTpm._nv_write, 2, authorized=True),
    0x143: _Command(FakeTpm._self_test),
    0x144: _Command(FakeTpm._startup),
    0x145: _Command(FakeTpm._shutdown),
    0x14E: _Command(FakeTpm._nv_read, 2, authorized=True),
    0x17B: _Command(FakeTpm._get_random),
    0x17E: _Command(FakeTpm._pcr_read),
    0x182: _Command(FakeTpm._pcr_extend, 1, authorized=True),
}

# State as bytes: one line that says what it is and in which version, then JSON.
_PERMANENT_HEAD: Final = b"crbd fake TPM, permanent state, version 1\n"
_VOLATILE_HEAD: Final = b"crbd fake TPM, volatile state, version 1\n"


def encode_permanent(state: Permanent) -> bytes:
    """The bytes that `decode_permanent` reads."""
    return _PERMANENT_HEAD + json.dumps(asdict(state), default=bytes.hex).encode()


def encode_volatile(state: Volatile) -> bytes:
    """The bytes that `decode_volatile` reads."""
    return _VOLATILE_HEAD + json.dumps(asdict(state), default=bytes.hex).encode()


def decode_permanent(data: bytes) -> Permanent:
    """Raises ValueError for anything but what `encode_permanent` made."""
    found = _document(data, _PERMANENT_HEAD)
    try:
        saved = found["saved_pcrs"]
        nv = {
            int(number): NvIndex(entry["size"], None if entry["data"] is None else bytes.fromhex(entry["data"]))
            for number, entry in found["nv"].items()
        }
        return Permanent(
            seed=bytes.fromhex(found["seed"]),
            startups=found["startups"],
            nv=nv,
            saved_pcrs=None if saved is None else [bytes.fromhex(value) for value in saved],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a permanent state: {error}") from error


def decode_volatile(data: bytes, permanent: Permanent) -> Volatile:
    """Raises ValueError for anything but what `encode_volatile` made of a state that belongs to `permanent`."""
    found = _document(data, _VOLATILE_HEAD)
    try:
        state = Volatile(
            seed=bytes.fromhex(found["seed"]),
            started=found["started"],
            drtm=found["drtm"],
            pcr_updates=found["pcr_updates"],
            pcrs=[bytes.fromhex(value) for value in found["pcrs"]],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a volatile state: {error}") from error
    if state.seed != permanent.seed:
        raise ValueError("the volatile state of another TPM")
    return state


def _document(data: bytes, head: bytes) -> Any:
    if not data.startswith(head):
        raise ValueError("not a state of the fake TPM in this version")
    return json.loads(data[len(head) :])
