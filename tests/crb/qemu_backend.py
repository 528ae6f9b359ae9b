"""A TPM backend for QEMU that answers what it is told to, when it is told to.

QEMU's `-tpmdev emulator` takes it for swtpm. It speaks the control channel with the codec of `crbd.control`, but shares
nothing with crbd's device model or server: what QEMU's tpm-crb does in front of it is QEMU's doing alone.

Theory. The control channel is served by a thread, since QEMU waits for its replies in the middle of a guest's access.
Nothing runs for the data channel: what QEMU sends waits in the socket until somebody looks, and QEMU waits for the
answer until `respond`. So a command stays in execution as long as a test wants.
"""

from __future__ import annotations

import array
import os
import socket
import threading
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Self

from crbd.control import messages as m
from crbd.control.connection import ControlConnection, Received
from crbd.tpm.codes import ResponseCode
from crbd.tpm.head import HEAD_SIZE, error_response
from crbd.tpm.results import TpmResult
from tests.e2e.waiting import Deadline

_CAPABILITIES: Final = (
    m.Capability.INIT
    | m.Capability.SHUTDOWN
    | m.Capability.GET_TPMESTABLISHED
    | m.Capability.SET_LOCALITY
    | m.Capability.CANCEL_TPM_CMD
    | m.Capability.RESET_TPMESTABLISHED
    | m.Capability.STOP
    | m.Capability.SET_DATAFD
    | m.Capability.SET_BUFFERSIZE
)
_SECONDS: Final = 10.0
"""The deadline for everything QEMU has to do by itself."""


class BackendError(AssertionError):
    """QEMU did not do what it was expected to do, or did it too late."""


class ScriptedBackend:
    """One TPM for one QEMU. A context manager: leaving it closes its sockets and ends its thread.

    Leaving it raises BackendError if QEMU asked for anything `unexpected`.
    """

    def __init__(self, buffer_size: int = 4096) -> None:
        """`buffer_size`: the largest buffer in bytes, and the one in force until QEMU asks for another."""
        self.established = False
        """What GET_TPMESTABLISHED is answered with."""
        self.cancels = 0
        """How often CANCEL_TPM_CMD came."""
        self.unexpected: list[m.Request | None] = []
        """Requests that tpm-crb is not known to make, such as RESET_TPMESTABLISHED; None: no request at all."""
        self._largest = self._buffer_size = buffer_size
        self._arrived = bytearray()
        self._data: socket.socket | None = None
        self._control, self.qemu_end = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="scripted TPM backend")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            stack.callback(self._thread.join)
            stack.callback(self.qemu_end.close)
            stack.callback(self._control.shutdown, socket.SHUT_RDWR)
        self._control.close()
        if self._data is not None:
            self._data.close()
        if error is None and self.unexpected:
            raise BackendError(f"QEMU was not expected to ask for {self.unexpected}")

    # ---- the data channel, on the caller's thread ----

    def await_bytes(self, count: int) -> None:
        """Until QEMU has sent `count` bytes of a command since the last `take`. Raises BackendError."""
        deadline = Deadline(_SECONDS)
        while len(self._arrived) < count:
            if not self._receive(deadline.remaining()):
                raise BackendError(f"QEMU sent {len(self._arrived)} of {count} bytes within {_SECONDS} s")

    def take(self) -> bytes:
        """What QEMU has sent since the last call, and had sent when this one began."""
        while self._receive(0.0):
            pass
        taken = bytes(self._arrived)
        self._arrived.clear()
        return taken

    def respond(self, response: bytes) -> None:
        """Answer the command in execution."""
        self._channel().sendall(response)

    def fail(self) -> None:
        """Break the data channel, for good: the command in execution, and every later one, fails in QEMU."""
        self._channel().shutdown(socket.SHUT_RDWR)

    def _channel(self) -> socket.socket:
        if self._data is None:
            raise BackendError("QEMU has opened no data channel")
        return self._data

    def _receive(self, seconds: float) -> bool:
        """Take in what is there, or comes within `seconds`. False if there is nothing."""
        channel = self._channel()
        channel.settimeout(seconds)
        try:
            data = channel.recv(65536)
        except (TimeoutError, BlockingIOError):
            return False
        finally:
            channel.settimeout(_SECONDS)
        self._arrived += data
        return bool(data)

    # ---- the control channel, on the thread ----

    def _serve(self) -> None:
        connection = ControlConnection()
        while True:
            data, descriptors = _receive_with_descriptors(self._control)
            if not data:
                break
            connection.receive(data, descriptors)
            while (event := connection.next_event()) is not None:
                request = event.request if isinstance(event, Received) else None
                self._control.sendall(m.encode_reply(self._reply(request)))
                if isinstance(request, m.SetDataFd):
                    self._answer_probe()
        for descriptor in connection.abandon():
            os.close(descriptor)

    def _reply(self, request: m.Request | None) -> m.Reply:
        match request:
            case m.GetCapability():
                return m.Capabilities(_CAPABILITIES)
            case m.GetTpmEstablished():
                return m.Established(int(self.established))
            case m.SetBufferSize(wanted):
                self._buffer_size = min(wanted or self._buffer_size, self._largest)
                return m.BufferSizes(self._buffer_size, HEAD_SIZE, self._largest)
            case m.CancelTpmCmd():
                self.cancels += 1
            case m.SetDataFd(fd):
                self._data = socket.socket(fileno=fd)
                self._data.settimeout(_SECONDS)
            case m.SetLocality(0) | m.Init() | m.Stop() | m.Shutdown():
                pass
            case _:
                self.unexpected.append(request)
                return m.Failure(TpmResult.BAD_ORDINAL)
        return m.Done()

    def _answer_probe(self) -> None:
        """QEMU asks for the clock before it powers the TPM on; a TPM 2.0 head in the answer tells it the version."""
        probe = b""
        while len(probe) < HEAD_SIZE and (data := self._channel().recv(HEAD_SIZE - len(probe))):
            probe += data
        self._channel().sendall(error_response(ResponseCode.FAILURE))


def _receive_with_descriptors(line: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """What one read brings; no bytes once the other end is closed."""
    descriptors = array.array("i")
    try:
        data, ancillary, _, _ = line.recvmsg(65536, socket.CMSG_SPACE(4 * descriptors.itemsize))
    except ConnectionError:
        return b"", ()
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
    return data, tuple(descriptors)
