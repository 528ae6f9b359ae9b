"""What a daemon passes to its successor so that no client notices the change: the handover. docs/handover.md.

    magic, u16 version | body: sections | SHA-256 of all before it

The body is the document's list of sections (crbd.state.sections), numbers little-endian:

    handover     who left this
        u32 process id, u64 nanoseconds of the monotonic clock, u8 length, writer (UTF-8, up to 64 bytes)
    document     the frozen TPM, plain: a document (crbd.state.document)
    instance     what the daemon knew beyond it
        u8 flags: 1 powered on, 2 may still make a new TPM, 4 a client set the buffer size, 8 the TPM came by migration
        and ran no command since
        u8 the kinds of state handed in for the next INIT, a bit each: 1 permanent, 2 volatile, 4 savestate
    incoming     a session (crbd.state.saved) that came with a volatile state handed in for the next INIT
    changed.*    `permanent`, `volatile`, `savestate`: state that a failed commit has not made durable yet; empty where
                 the state is to be deleted
    held.*       the same names: what an ephemeral store holds
    changed.side, held.side
                 what belongs to the volatile state among them: the bytes of its file (crbd.state.side), unframed
    secret.*     keys that the successor could not read again: `seal`, the data key of a sealed store; `file` and
                 `migration`, keys as swtpm has them
    at-rest      32 bytes: SHA-256 of what the store held when this was left to a service manager (crbd.server.fdstore);
                 missing where the successor is the same process
    pid-file     its path
    listener.*   a listening socket: u8 flags: 1 to be removed at the end; u64 device, u64 inode of its path
    link.N       one client, N from 0
        u8 role: 1 control, 2 data, 3 registers
        u8 flags: 1 has its turn, 2 what was received may be padding, 4 is owed the answer to UPGRADE; of role 3:
            8 has said its version, 16 takes descriptors, 32 may send several writes in one message, 64 the data
            buffer's descriptor goes along with what was not sent yet
        u32 length, bytes received and not dealt with; u32 length, bytes not sent yet
        u16 count of descriptors that came along: for each u32, how many of the received bytes had come with it
        u16 count of requests not carried out: for each u8 kind
            1: u8 whether a descriptor belongs to it, u32 length, the request as it came
            2: u32 TPM_RESULT, u8 close, u16 length, reason (UTF-8)
        of role 3: 256 bytes, PCI configuration space

Descriptors go beside it, by name: `listener.*` and `link.N` themselves, `link.N.with.K` for what came along,
`link.N.request.K` for requests', `store.*` for the store's, `registers.buffer` for the memory of the data buffer. The
handover lives in memory that only the two processes see, never in a file, and is not kept: so it holds keys in clear. A
successor of another release reads what an older one wrote; a section that it does not know and must not skip, or a
newer version of one, makes it refuse before anything is touched, and the predecessor goes on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from struct import Struct
from typing import Final

from crbd.control.connection import ConnectionSnapshot, Event, Received, Rejected
from crbd.control.messages import decode_request, encode_request
from crbd.control.requests import SetDataFd
from crbd.control.spec import BY_CODE, CODE_SIZE
from crbd.errors import StateDamagedError, StateNewerError, WireError
from crbd.state.fields import FieldReader, damaged
from crbd.state.kinds import StateKind
from crbd.state.saved import Session, decode_session, encode_session
from crbd.state.sections import Section, Sections, decode_body, encode_body
from crbd.state.side import SideState, decode_side, digest_of, encode_side
from crbd.tpm.results import TpmResult
from crbd.vfiouser.capabilities import Capabilities
from crbd.vfiouser.configuration import SIZE as CONFIGURATION_SIZE
from crbd.vfiouser.configuration import is_possible
from crbd.vfiouser.connection import Snapshot

MAGIC: Final = b"\x8aCRBDlive"
VERSION: Final = 1
DIGEST_SIZE: Final = 32
MAX_HANDOVER: Final = 256 << 20
"""Bytes. A client may be in the middle of sending 64 MiB (HASH_DATA); no handover of real clients comes near."""
NAME: Final = "the handover of the daemon before this one"

_HEAD = Struct("<9sH")
_WHO = Struct("<IQB")
_LISTENER = Struct("<BQQ")
_INSTANCE = Struct("<BB")
_FLAGS = {1: "powered", 2: "may_manufacture", 4: "client_sized", 8: "untouched"}
_OWNED = 1
_TURN, _PADDING, _OWED = 1, 2, 4
_AGREED, _TAKES_DESCRIPTORS, _WRITE_MULTIPLE, _WITH_BUFFER = 8, 16, 32, 64
_REQUEST, _REJECTED = 1, 2
SECRETS: Final = ("seal", "file", "migration")
CONTROL: Final = 1
DATA: Final = 2
REGISTERS: Final = 3
_FLAGS_OF = {
    CONTROL: _TURN | _PADDING | _OWED,
    DATA: 0,
    REGISTERS: _AGREED | _TAKES_DESCRIPTORS | _WRITE_MULTIPLE | _WITH_BUFFER,
}
_SIDE = "side"
_BIT = {kind: 1 << index for index, kind in enumerate(StateKind)}
_KINDS = {kind.name.lower(): kind for kind in StateKind}


@dataclass(frozen=True, slots=True)
class InstanceFacts:
    """What an instance is beyond its document."""

    powered: bool
    may_manufacture: bool
    client_sized: bool = False
    """A client set the buffer size."""
    untouched: bool = False
    """The TPM came by migration and ran no command since."""
    handed_in: frozenset[StateKind] = frozenset()
    """What SET_STATEBLOB brought and no INIT has used."""
    incoming: Session | None = None
    """What came with a volatile state among them."""


@dataclass(frozen=True, slots=True)
class Listener:
    """A listening socket; with `identity` (device, inode) the path that is to be removed when the daemon ends."""

    identity: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ControlLink:
    """A control client. Descriptors in the snapshot are numbers of this process."""

    connection: ConnectionSnapshot = field(default_factory=ConnectionSnapshot)
    unsent: bytes = b""
    has_turn: bool = False
    owed: bool = False
    """It asked for the upgrade, and waits for the answer."""


@dataclass(frozen=True, slots=True)
class DataLink:
    """A data client."""

    received: bytes = b""
    unsent: bytes = b""


@dataclass(frozen=True, slots=True)
class RegistersLink:
    """A register client."""

    connection: Snapshot = field(default_factory=Snapshot)
    unsent: bytes = b""
    with_buffer: bool = False
    """The data buffer's descriptor goes along with the first byte of `unsent`."""


Link = ControlLink | DataLink | RegistersLink


@dataclass(frozen=True, slots=True)
class Handover:
    """The whole. `descriptors` maps names to numbers of the process that has it."""

    pid: int
    frozen_at: int
    """Nanoseconds of the monotonic clock."""
    writer: str
    document: bytes
    instance: InstanceFacts
    changed: Mapping[StateKind, bytes | None] = field(default_factory=dict)
    """What the store does not hold yet, because the last commit failed; None is to be deleted."""
    held: Mapping[StateKind, bytes] = field(default_factory=dict)
    """What an ephemeral store holds."""
    changed_side: SideState | None = None
    """What belongs to the volatile state in `changed`."""
    held_side: SideState | None = None
    """What belongs to the volatile state in `held`."""
    secrets: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    pid_file: str = ""
    listeners: Mapping[str, Listener] = field(default_factory=dict)
    """By channel: "ctrl", "data", "registers"."""
    links: tuple[Link, ...] = ()
    descriptors: Mapping[str, int] = field(default_factory=dict)
    at_rest: bytes = b""
    """Of what was left for a process that may never come: what the store has to hold if it does; else empty."""

    def only_listening(self, channels: Container[str]) -> Handover:
        """Without the listeners of other channels."""
        others = {name for name in self.listeners if name not in channels}
        return replace(
            self,
            listeners={name: listener for name, listener in self.listeners.items() if name not in others},
            descriptors={
                name: number
                for name, number in self.descriptors.items()
                if name.removeprefix("listener.") not in others
            },
        )


# -- writing
# ----------------------------------------------------------------------------------------------------------------------


def encode(handover: Handover) -> bytes:
    """The handover's bytes, without its descriptors."""
    writer = handover.writer.encode("utf-8")
    sections = [
        Section("handover", 1, _WHO.pack(handover.pid, handover.frozen_at, len(writer)) + writer),
        Section("document", 1, handover.document),
        Section("instance", 1, _encode_instance(handover.instance)),
    ]
    if handover.instance.incoming is not None:
        sections.append(Section("incoming", 1, encode_session(handover.instance.incoming)))
    if handover.at_rest:
        sections.append(Section("at-rest", 1, handover.at_rest))
    if handover.pid_file:
        sections.append(Section("pid-file", 1, handover.pid_file.encode("utf-8", "surrogateescape")))
    sections += (Section(f"secret.{name}", 1, secret) for name, secret in handover.secrets.items())
    sections += (Section(f"changed.{kind.name.lower()}", 1, data or b"") for kind, data in handover.changed.items())
    sections += (Section(f"held.{kind.name.lower()}", 1, data) for kind, data in handover.held.items())
    sections += _encode_side("changed", handover.changed, handover.changed_side)
    sections += _encode_side("held", handover.held, handover.held_side)
    for name, listener in handover.listeners.items():
        flags = 0 if listener.identity is None else _OWNED
        sections.append(Section(f"listener.{name}", 1, _LISTENER.pack(flags, *(listener.identity or (0, 0)))))
    for number, link in enumerate(handover.links):
        sections.append(Section(f"link.{number}", 1, _encode_link(link)))
    whole = _HEAD.pack(MAGIC, VERSION) + encode_body(tuple(sections))
    return whole + hashlib.sha256(whole).digest()


def _encode_side(family: str, states: Mapping[StateKind, bytes | None], side: SideState | None) -> Sections:
    volatile = states.get(StateKind.VOLATILE)
    if volatile is None or side is None:
        return ()
    return (Section(f"{family}.{_SIDE}", 1, encode_side({digest_of(volatile): side})),)


def descriptors_in(links: tuple[Link, ...]) -> dict[str, int]:
    """The descriptors that came along with requests, by the names under which `decode` wants them back."""
    named: dict[str, int] = {}
    for number, link in enumerate(links):
        if isinstance(link, ControlLink):
            named |= {f"link.{number}.with.{index}": fd for index, (_, fd) in enumerate(link.connection.waiting)}
            named |= {
                f"link.{number}.request.{index}": event.request.fd
                for index, event in enumerate(link.connection.events)
                if isinstance(event, Received) and isinstance(event.request, SetDataFd)
            }
    return named


def _encode_instance(facts: InstanceFacts) -> bytes:
    flags = sum(bit for bit, name in _FLAGS.items() if getattr(facts, name))
    return _INSTANCE.pack(flags, sum(_BIT[kind] for kind in facts.handed_in))


def _encode_link(link: Link) -> bytes:
    if isinstance(link, DataLink):
        return bytes((DATA, 0)) + _counted(link.received) + _counted(link.unsent) + bytes(4)
    if isinstance(link, RegistersLink):
        return _encode_registers_link(link)
    connection = link.connection
    flags = (_TURN if link.has_turn else 0) | (_PADDING if connection.may_be_padding else 0)
    flags |= _OWED if link.owed else 0
    parts = [bytes((CONTROL, flags)), _counted(connection.received), _counted(link.unsent)]
    parts.append(len(connection.waiting).to_bytes(2, "little"))
    parts += (position.to_bytes(4, "little") for position, _ in connection.waiting)
    parts.append(len(connection.events).to_bytes(2, "little"))
    parts += (_encode_event(event) for event in connection.events)
    return b"".join(parts)


def _encode_registers_link(link: RegistersLink) -> bytes:
    agreed = link.connection.agreed
    flags = _WITH_BUFFER if link.with_buffer else 0
    if agreed is not None:
        flags |= _AGREED | (_TAKES_DESCRIPTORS if agreed.takes_descriptors else 0)
        flags |= _WRITE_MULTIPLE if agreed.write_multiple else 0
    head = bytes((REGISTERS, flags))
    received = _counted(link.connection.received)
    return head + received + _counted(link.unsent) + bytes(4) + link.connection.configuration


def _encode_event(event: Event) -> bytes:
    if isinstance(event, Received):
        belongs = isinstance(event.request, SetDataFd)
        return bytes((_REQUEST, belongs)) + _counted(encode_request(event.request))
    reason = event.reason.encode("utf-8")
    head = bytes((_REJECTED,)) + int(event.result).to_bytes(4, "little") + bytes((event.close,))
    return head + len(reason).to_bytes(2, "little") + reason


def _counted(data: bytes) -> bytes:
    return len(data).to_bytes(4, "little") + data


# -- reading
# ----------------------------------------------------------------------------------------------------------------------


def decode(data: bytes, descriptors: Mapping[str, int]) -> Handover:
    """The other way; what wants a descriptor that is not among `descriptors` is refused.

    Raises StateDamagedError, or StateNewerError for what only a later release understands.
    """
    known = _known(_sections(data))
    for needed in ("handover", "document", "instance"):
        if needed not in known:
            raise damaged(NAME, f"section {needed}", "is missing")
    reader = FieldReader(known["handover"], NAME, "section handover")
    pid, frozen_at = reader.u32("pid"), reader.u64("frozen at")
    writer = reader.text("writer", reader.u8("writer length"))
    reader.end()
    numbers = sorted(int(name[5:]) for name in known if name.startswith("link."))
    if numbers != list(range(len(numbers))):
        raise damaged(NAME, "sections link.*", "are not numbered one after the other")
    return Handover(
        pid=pid,
        frozen_at=frozen_at,
        writer=writer,
        document=known["document"],
        instance=_decode_instance(known["instance"], known.get("incoming")),
        changed={kind: data or None for kind, data in _by_kind(known, "changed.")},
        held=dict(_by_kind(known, "held.")),
        changed_side=_decode_side(known, "changed"),
        held_side=_decode_side(known, "held"),
        secrets={name.partition(".")[2]: secret for name, secret in known.items() if name.startswith("secret.")},
        pid_file=known.get("pid-file", b"").decode("utf-8", "surrogateescape"),
        listeners={
            name.partition(".")[2]: _decode_listener(body, name)
            for name, body in known.items()
            if name.startswith("listener.")
        },
        links=tuple(_decode_link(known[f"link.{number}"], f"link.{number}", descriptors) for number in numbers),
        descriptors=descriptors,
        at_rest=_decode_at_rest(known.get("at-rest")),
    )


def _decode_at_rest(body: bytes | None) -> bytes:
    if body is None:
        return b""
    if len(body) != DIGEST_SIZE:
        raise damaged(NAME, "section at-rest", f"has {len(body)} bytes")
    return body


def _sections(data: bytes) -> Sections:
    whole = len(data) - DIGEST_SIZE
    if whole < _HEAD.size or len(data) > MAX_HANDOVER or not data.startswith(MAGIC):
        raise damaged(NAME, "head", "is none")
    if hashlib.sha256(memoryview(data)[:whole]).digest() != data[whole:]:
        raise damaged(NAME, "whole", "is not what was written: its SHA-256 is another")
    version = _HEAD.unpack_from(data)[1]
    if version != VERSION:
        raise StateNewerError(
            f"{NAME} has format version {version}, this release reads {VERSION}", "install the newer release"
        )
    return decode_body(data[_HEAD.size : whole], NAME)


def _known(sections: Sections) -> dict[str, bytes]:
    known: dict[str, bytes] = {}
    for section in sections:
        family, _, rest = section.name.partition(".")
        if section.version == 1 and _is_ours(family, rest):
            known[section.name] = section.data
        elif not section.may_skip:
            raise StateNewerError(
                f"{NAME} has a section {section.name} of version {section.version} that this release does not know",
                "install the newer release",
            )
    return known


def _is_ours(family: str, rest: str) -> bool:
    match family:
        case "handover" | "document" | "instance" | "incoming" | "at-rest" | "pid-file":
            return not rest
        case "secret":
            return rest in SECRETS
        case "changed" | "held":
            return rest in _KINDS or rest == _SIDE
        case "listener":
            return rest in ("ctrl", "data", "registers")
        case _:
            return family == "link" and rest.isdecimal()


def _by_kind(known: Mapping[str, bytes], prefix: str) -> tuple[tuple[StateKind, bytes], ...]:
    found = ((name[len(prefix) :], data) for name, data in known.items() if name.startswith(prefix))
    return tuple((_KINDS[name], data) for name, data in found if name != _SIDE)


def _decode_side(known: Mapping[str, bytes], family: str) -> SideState | None:
    """Raises StateDamagedError, StateNewerError."""
    data = known.get(f"{family}.{_SIDE}")
    if data is None:
        return None
    found = decode_side(data, f"{NAME}, section {family}.{_SIDE}").get(digest_of(known.get(f"{family}.volatile", b"")))
    if found is None:
        raise damaged(NAME, f"section {family}.{_SIDE}", "belongs to other volatile state")
    return found


def _decode_instance(body: bytes, incoming: bytes | None) -> InstanceFacts:
    reader = FieldReader(body, NAME, "section instance")
    flags = reader.u8("flags")
    if flags & ~sum(_FLAGS):
        raise reader.wrong("flags", f"are {flags:#x}")
    bits = reader.u8("handed in")
    if bits & ~sum(_BIT.values()):
        raise reader.wrong("handed in", f"is {bits:#x}")
    reader.end()
    return InstanceFacts(
        **{name: bool(flags & bit) for bit, name in _FLAGS.items()},
        handed_in=frozenset(kind for kind, bit in _BIT.items() if bits & bit),
        incoming=None if incoming is None else decode_session(incoming, NAME),
    )


def _decode_listener(body: bytes, name: str) -> Listener:
    reader = FieldReader(body, NAME, f"section {name}")
    flags, device, inode = reader.u8("flags"), reader.u64("device"), reader.u64("inode")
    if flags & ~_OWNED:
        raise reader.wrong("flags", f"are {flags:#x}")
    reader.end()
    return Listener((device, inode) if flags else None)


def _decode_link(body: bytes, name: str, descriptors: Mapping[str, int]) -> Link:
    reader = FieldReader(body, NAME, f"section {name}")
    role, flags = reader.u8("role"), reader.u8("flags")
    if role not in _FLAGS_OF:
        raise reader.wrong("role", f"is {role}")
    if flags & ~_FLAGS_OF[role]:
        raise reader.wrong("flags", f"are {flags:#x}")
    received = reader.take("received", reader.u32("received length"))
    unsent = reader.take("unsent", reader.u32("unsent length"))
    positions = [reader.u32("position") for _ in range(reader.u16("descriptors"))]
    waiting = tuple(
        (position, _wanted(descriptors, f"{name}.with.{index}")) for index, position in enumerate(positions)
    )
    events = tuple(
        _decode_event(reader, f"{name}.request.{index}", descriptors) for index in range(reader.u16("requests"))
    )
    space = reader.take("configuration", CONFIGURATION_SIZE) if role == REGISTERS else b""
    reader.end()
    if role == DATA:
        return DataLink(received, unsent)
    if role == REGISTERS:
        if not is_possible(space):
            raise reader.wrong("configuration", "is not that of this device")
        agreed = Capabilities(bool(flags & _TAKES_DESCRIPTORS), bool(flags & _WRITE_MULTIPLE))
        snapshot = Snapshot(received, agreed if flags & _AGREED else None, space)
        return RegistersLink(snapshot, unsent, bool(flags & _WITH_BUFFER))
    connection = ConnectionSnapshot(received, bool(flags & _PADDING), waiting, events)
    return ControlLink(connection, unsent, bool(flags & _TURN), bool(flags & _OWED))


def _decode_event(reader: FieldReader, name: str, descriptors: Mapping[str, int]) -> Event:
    kind = reader.u8("kind of request")
    if kind == _REJECTED:
        result, close = reader.u32("result"), bool(reader.u8("close"))
        reason = reader.text("reason", reader.u16("reason length"))
        try:
            return Rejected(TpmResult(result), close, reason)
        except ValueError as error:
            raise reader.wrong("result", f"is {result:#x}") from error
    if kind != _REQUEST:
        raise reader.wrong("kind of request", f"is {kind}")
    belongs = reader.u8("descriptor belongs")
    data = reader.take("request", reader.u32("request length"))
    command = BY_CODE.get(int.from_bytes(data[:CODE_SIZE], "big"))
    if command is None:
        raise StateNewerError(f"{NAME} has a control request that this release does not know", "install the newer one")
    if bool(belongs) != (command.request is SetDataFd):
        raise reader.wrong("descriptor belongs", f"is {belongs} for {command.name}")
    try:
        request = decode_request(command, data[CODE_SIZE:], _wanted(descriptors, name) if belongs else -1)
    except WireError as error:
        raise reader.wrong("request", str(error)) from error
    return Received(request)


def _wanted(descriptors: Mapping[str, int], name: str) -> int:
    try:
        return descriptors[name]
    except KeyError:
        raise StateDamagedError(f"{NAME}: the descriptor {name} did not come along", "start anew") from None
