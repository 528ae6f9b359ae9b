"""One client's end of the control channel, without the socket: bytes and descriptors in, events out.

Theory. The stream is a sequence of requests, each a code and a body whose length its own beginning tells
(`crbd.control.spec`). Every `receive` is parsed at once, as far as it goes; what is left is the beginning of one
request, or nothing. So memory grows only with bytes that have really arrived, and never past one request and one
receive. A length above its cap ends the connection as soon as it has been read.

*Padding.* Behind the one byte that SET_LOCALITY and RESET_TPMESTABLISHED carry, some clients (QEMU) send three more, of
any value, because they send the whole C union; others (swtpm_ioctl) do not. The request is emitted with its first body
byte. The fourth byte after that decides: every code lies between 1 and 255, so behind three bytes of padding it is the
first byte of the next code, 0; without padding it is the last byte of the next code, not 0. Until there are four,
nobody can tell padding from the beginning of a request: they wait, and the connection does not count as `partial`,
since a client that pads is not stalling.

*Unknown codes.* If nothing complete came before it in the same receive, it is a request that we do not know: rejected,
and the rest of the receive is discarded, since nobody knows how long it is. Behind complete requests in the same
receive it is no request, but what the client's struct had behind its members: discarded without a word, as swtpm does.
One to three bytes are always taken for the beginning of a code.

*Descriptors* are opaque numbers here. One that arrives belongs to the bytes that it arrived with; a SET_DATAFD takes
the oldest that came with or before its own bytes and whose bytes are not all used up by earlier requests. Every receive
may bring one; what is more, what comes with other requests and what is left at the end is unclaimed. Whatever is handed
in comes out again exactly once: in a SetDataFd, from `unclaimed_fds`, or from `abandon`.

*The end.* After a Rejected that closes, or the end of the stream, nothing is parsed any more. Events from before it can
still be fetched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from crbd.control.messages import decode_request
from crbd.control.requests import Request, SetDataFd
from crbd.control.spec import BY_CODE, CODE_SIZE, COMMANDS, PADDING, Command
from crbd.errors import WireError
from crbd.tpm.results import TpmResult
from crbd.wire.buffer import ReceiveBuffer

MAX_REQUEST = CODE_SIZE + max(row.body.fixed + (row.body.data.limit if row.body.data else 0) for row in COMMANDS)
"""The longest request in bytes."""
MAX_RECEIVE = 1 << 20
"""The most bytes that one `receive` is meant to bring."""


@dataclass(frozen=True, slots=True)
class Received:
    """A whole request: carry it out and answer it."""

    request: Request


@dataclass(frozen=True, slots=True)
class Rejected:
    """No request that could be carried out: answer Failure(result) and, if `close`, close the connection."""

    result: TpmResult
    close: bool
    reason: str
    """For the log."""


Event = Received | Rejected


@dataclass(frozen=True, slots=True)
class ConnectionSnapshot:
    """A connection between two reads, so that another one can go on with it."""

    received: bytes = b""
    """The beginning of a request, or what may be padding."""
    may_be_padding: bool = False
    waiting: tuple[tuple[int, int], ...] = ()
    """Descriptors that a SET_DATAFD may still take: how many of the `received` bytes had come with it, and itself."""
    events: tuple[Event, ...] = ()
    """Not fetched yet."""


class ControlConnection:
    """The protocol's state for one client."""

    def __init__(self) -> None:
        self._buffer = ReceiveBuffer(MAX_REQUEST + MAX_RECEIVE)
        self._events: deque[Event] = deque()
        self._received = 0
        self._waiting: deque[tuple[int, int]] = deque()
        """Descriptors that a SET_DATAFD may still take, each behind the stream's length after it had come."""
        self._unclaimed: list[int] = []
        self._may_be_padding = False
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether nothing more is parsed: the stream has ended, or a Rejected closes it."""
        return self._closed

    @property
    def partial(self) -> bool:
        """Whether a request has begun and lacks bytes. What may be padding does not count."""
        return len(self._buffer) > 0 and not self._may_be_padding

    @property
    def declared_size(self) -> int:
        """The size in bytes of the partial request, as far as it has been declared; 0 if there is none."""
        if not self.partial:
            return 0
        command = self._command()
        return self._size(command) if command else CODE_SIZE

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """What one read brought: at most MAX_RECEIVE bytes, and the descriptors that came along. Never raises."""
        self._received += len(data)
        self._unclaimed += fds[1:]
        self._waiting += ((self._received, fd) for fd in fds[:1])
        if not self._closed:
            try:
                self._buffer.append(data)
            except WireError as error:
                self._reject(TpmResult.SIZE, str(error), close=True)
            else:
                self._parse()
        self._release_descriptors()

    def next_event(self) -> Event | None:
        """The oldest event that has not been fetched, or None: more bytes are needed, or the end has come."""
        return self._events.popleft() if self._events else None

    def put_back(self, event: Event) -> None:
        """Make the event that was fetched last the oldest one again."""
        self._events.appendleft(event)

    def unclaimed_fds(self) -> tuple[int, ...]:
        """Descriptors that no request took or will take. They are the caller's to close, and not told again."""
        unclaimed = tuple(self._unclaimed)
        self._unclaimed.clear()
        return unclaimed

    def end_of_stream(self) -> None:
        """No more bytes come. A request that lacks bytes is forgotten; events can still be fetched."""
        self._close()
        self._release_descriptors()

    def abandon(self) -> tuple[int, ...]:
        """End the stream, drop the events, and return all descriptors still inside: the caller must close them."""
        self.end_of_stream()
        events, self._events = self._events, deque()
        for event in events:
            if isinstance(event, Received) and isinstance(event.request, SetDataFd):
                self._unclaimed.append(event.request.fd)
        return self.unclaimed_fds()

    def freeze(self) -> ConnectionSnapshot:
        """All that is inside but the unclaimed descriptors; the connection is closed and empty afterwards.

        The snapshot's descriptors belong to whoever has it.
        """
        front = self._received - len(self._buffer)
        snapshot = ConnectionSnapshot(
            self._buffer.peek(len(self._buffer)),
            self._may_be_padding,
            tuple((max(0, position - front), fd) for position, fd in self._waiting),
            tuple(self._events),
        )
        self._waiting.clear()
        self._events.clear()
        self._close()
        return snapshot

    @classmethod
    def thaw(cls, snapshot: ConnectionSnapshot) -> ControlConnection:
        """A connection that goes on where `snapshot` was taken. Raises WireError for more bytes than can wait."""
        connection = cls()
        connection._buffer.append(snapshot.received)
        connection._received = len(snapshot.received)
        connection._may_be_padding = snapshot.may_be_padding
        connection._waiting.extend(snapshot.waiting)
        connection._events.extend(snapshot.events)
        return connection

    def _parse(self) -> None:
        complete_before = False
        while not self._closed and self._skip_padding() and len(self._buffer) >= CODE_SIZE:
            command = self._command()
            if command is None:
                if not complete_before:
                    code = int.from_bytes(self._buffer.peek(CODE_SIZE), "big")
                    self._reject(TpmResult.BAD_ORDINAL, f"unknown command code 0x{code:08x}", close=False)
                self._buffer.clear()
            elif self._take(command):
                complete_before = True
            else:
                return

    def _skip_padding(self) -> bool:
        """Whether it is clear where the next request begins; padding before it is gone then."""
        if not self._may_be_padding:
            return True
        following = self._buffer.peek(PADDING + 1)
        if len(following) <= PADDING:
            return False
        if following[PADDING] == 0:
            self._buffer.consume(PADDING)
            self._buffer.commit()
        self._may_be_padding = False
        return True

    def _command(self) -> Command | None:
        """The row of the request at the front; None if its code is unknown or not yet whole."""
        head = self._buffer.peek(CODE_SIZE)
        return BY_CODE.get(int.from_bytes(head, "big")) if len(head) == CODE_SIZE else None

    def _size(self, command: Command) -> int:
        """The size in bytes of the request at the front, as far as it has been declared."""
        return CODE_SIZE + command.body.declared(self._buffer.peek(CODE_SIZE + command.body.fixed)[CODE_SIZE:])

    def _take(self, command: Command) -> bool:
        """Make the request at the front an event. False, with nothing changed, if it lacks bytes."""
        size = self._size(command)
        data = command.body.data
        if data and size - CODE_SIZE - command.body.fixed > data.limit:
            self._reject(data.too_long, f"{command.name} of {size} bytes is too long", close=True)
            return True
        code = self._buffer.consume(CODE_SIZE)
        body = self._buffer.consume(size - CODE_SIZE)
        if code is None or body is None:
            self._buffer.rollback()
            return False
        self._release_descriptors(self._received - len(self._buffer) - size)
        self._buffer.commit()
        self._may_be_padding = command.padded
        if command.request is not SetDataFd:
            self._events.append(Received(decode_request(command, body)))
        elif self._waiting:
            _, fd = self._waiting.popleft()
            self._events.append(Received(SetDataFd(fd)))
        else:
            self._reject(TpmResult.BAD_PARAMETER, f"{command.name} without a descriptor", close=False)
        return True

    def _reject(self, result: TpmResult, reason: str, *, close: bool) -> None:
        self._events.append(Rejected(result, close, reason))
        if close:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._buffer.clear()
        self._may_be_padding = False

    def _release_descriptors(self, position: int | None = None) -> None:
        """What can no longer be taken by a request that begins at `position` (default: the front) becomes unclaimed."""
        if position is None:
            position = self._received if self._command() else self._received - len(self._buffer)
        while self._waiting and self._waiting[0][0] <= position:
            self._unclaimed.append(self._waiting.popleft()[1])
