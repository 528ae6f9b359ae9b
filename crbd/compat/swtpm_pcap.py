"""`--pcap` of the swtpm command: the file, and a libtpms whose commands are written down in it (swtpm 0.11: common.c).

Written is what reaches the TPM, its own TPM2_Startup and TPM2_Shutdown too. A file that cannot be written any more is
said so in the log once, and the TPM goes on without.
"""

from __future__ import annotations

import logging
import os
import random
import time

from crbd.compat.swtpm_grammar import Values
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import StatePort
from crbd.errors import UsageError
from crbd.observe.pcapng import CLIENT_PORTS, Conversation

log = logging.getLogger(__name__)

PCAP_MODE = 0o640
"""Permission bits of the file, whatever the umask, unless `mode=` says otherwise."""


class PcapFile:
    """A pcapng file that is written to."""

    def __init__(self, descriptor: int, *, checksums: bool) -> None:
        """The descriptor is its own from now on."""
        self._descriptor = descriptor
        self._works = True
        self._conversation = Conversation(
            random.choice(CLIENT_PORTS), random.getrandbits(32), random.getrandbits(32), checksums
        )
        self._write(self._conversation.begin(_now()))

    def command(self, data: bytes) -> None:
        """Write a command down."""
        self._write(self._conversation.command(data, _now()))

    def response(self, data: bytes) -> None:
        """Write a response down."""
        self._write(self._conversation.response(data, _now()))

    def close(self) -> None:
        """Write the end, and close. Closing twice is no error."""
        if self._descriptor >= 0:
            self._write(self._conversation.end(_now()))
            os.close(self._descriptor)
            self._descriptor = -1

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest and self._works:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError as error:
            self._works = False
            log.error("nothing more goes into the pcap file: %s", error.strerror)


class RecordedLibtpms(LibtpmsEngine):
    """libtpms, every command of which goes into a file."""

    def __init__(self, port: StatePort, file: PcapFile, *, debug_fd: int | None, debug_level: int) -> None:
        super().__init__(port, debug_fd=debug_fd, debug_level=debug_level)
        self._file = file

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        """As libtpms'; command and response are written down."""
        self._file.command(bytes(command))
        response = super().execute(command)
        self._file.response(response)
        return response


def open_pcap(values: Values) -> PcapFile:
    """The file that `--pcap` names. Raises UsageError, in swtpm's words."""
    path, descriptor = values.string("file"), values.descriptor("fd")
    truncate = values.flag("truncate")
    mode = values.number("mode")
    if path is not None:
        how = os.O_TRUNC if truncate else os.O_APPEND
        flags = os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC | how
        try:
            descriptor = os.open(path, flags, PCAP_MODE if mode is None else mode)
        except OSError as error:
            raise UsageError(f"Could not open pcap file for writing: {error.strerror}") from error
    elif descriptor is not None:
        _seek(descriptor, truncate=truncate)
    try:
        os.fchmod(-1 if descriptor is None else descriptor, PCAP_MODE if mode is None else mode)
    except OSError as error:
        raise UsageError(f"Could not chmod the pcap file: {error.strerror}") from error
    return PcapFile(-1 if descriptor is None else descriptor, checksums=values.flag("checksums"))


def _seek(descriptor: int, *, truncate: bool) -> None:
    try:
        os.lseek(descriptor, 0, os.SEEK_SET if truncate else os.SEEK_END)
    except OSError as error:
        raise UsageError(f"Could not seek to desired position in pcap file: {error.strerror}") from error
    try:
        if truncate:
            os.ftruncate(descriptor, 0)
    except OSError as error:
        raise UsageError(f"Could not ftruncate the pcap file: {error.strerror}") from error
    os.set_blocking(descriptor, False)


def _now() -> int:
    """Microseconds since 1970."""
    return time.time_ns() // 1000
