"""The other end: replies out of a stream, for whoever sends requests (our own command line tools, tests)."""

from __future__ import annotations

from collections import deque

from crbd.control.messages import decode_reply
from crbd.control.replies import Reply
from crbd.control.requests import Request
from crbd.control.spec import BY_REQUEST, RESULT_SIZE
from crbd.errors import WireError
from crbd.wire.buffer import ReceiveBuffer

MAX_BUFFERED = 16 << 20
"""The most bytes of replies that are held, and so the most that may be received between two `next_reply`."""


class ReplyDecoder:
    """Replies come in the order of the requests: announce each request with `expect`, then feed and fetch.

    Theory. A reply does not say what it is a reply to, and its first 32 bits decide its length: success has the layout
    of the request's row, an error is 4 bytes. GET_STATEBLOB's error is a whole head of 16 bytes, except from swtpm
    whose TPM is not running, which sends 4. Nobody can tell those from the beginning of 16: once the caller knows that
    no more comes (it has timed out, or the stream has ended), `next_reply(final=True)` takes the 4 bytes for the reply.
    """

    def __init__(self) -> None:
        self._buffer = ReceiveBuffer(MAX_BUFFERED)
        self._expected: deque[type[Request]] = deque()

    def expect(self, request: type[Request]) -> None:
        """A request of this class has been sent."""
        self._expected.append(request)

    def receive(self, data: bytes) -> None:
        """What one read brought. Raises WireError if no more may be held."""
        self._buffer.append(data)

    def next_reply(self, *, final: bool = False) -> Reply | None:
        """The reply to the oldest request that has none yet; None if it lacks bytes.

        Raises WireError for bytes that are no reply to it and for bytes that come unasked: the stream is lost then.
        """
        if not self._expected:
            if self._buffer:
                raise WireError(f"{len(self._buffer)} bytes of a reply that nobody asked for")
            return None
        request = self._expected[0]
        size = RESULT_SIZE if final and len(self._buffer) == RESULT_SIZE else self._size(request)
        data = self._buffer.consume(size)
        if data is None:
            return None
        self._buffer.commit()
        self._expected.popleft()
        return decode_reply(request, data)

    def _size(self, request: type[Request]) -> int:
        """The size in bytes of the reply at the front, as far as it is declared. Raises WireError above its cap."""
        command = BY_REQUEST[request]
        layout = command.reply_body
        head = self._buffer.peek(RESULT_SIZE + layout.fixed)
        if len(head) < RESULT_SIZE:
            return RESULT_SIZE
        if any(head[:RESULT_SIZE]) and not command.whole_head:
            return RESULT_SIZE
        size = layout.declared(head[RESULT_SIZE:])
        if layout.data and size - layout.fixed > layout.data.limit:
            raise WireError(f"the reply to {command.name} declares {size} bytes, which is too long")
        return RESULT_SIZE + size
