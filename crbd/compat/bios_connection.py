"""How `swtpm_bios` reaches a TPM: each command on a connection of its own, to a data channel or to a TPM device."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from crbd.compat.ioctl_connection import connect_tcp, connect_unix
from crbd.errors import DaemonError
from crbd.tpm.head import HEAD_SIZE

DEFAULT_PORT: Final = 6545
DEFAULT_DEVICE: Final = "/dev/tpm0"
LONGEST_RESPONSE: Final = 4096
"""Bytes; a kernel's TPM device hands out a whole response in one read."""


@dataclass(frozen=True, slots=True)
class Device:
    """A TPM device of the kernel."""

    path: str


@dataclass(frozen=True, slots=True)
class Unix:
    """A data channel at a UNIX socket."""

    path: str


@dataclass(frozen=True, slots=True)
class Tcp:
    """A data channel at a TCP port."""

    host: str
    port: int


Target = Device | Unix | Tcp


def target_of(environment: Mapping[str, str]) -> Target:
    """The TPM that the environment names, where the command line names none: TCSD_USE_TCP_DEVICE, TPM_DEVICE."""
    if "TCSD_USE_TCP_DEVICE" in environment:
        port = environment.get("TCSD_TCP_DEVICE_PORT", "")
        host = environment.get("TCSD_TCP_DEVICE_HOSTNAME", "localhost")
        return Tcp(host, int(port) if port.isascii() and port.isdigit() else DEFAULT_PORT)
    return Device(environment.get("TPM_DEVICE", DEFAULT_DEVICE))


def talk(target: Target, command: bytes, seconds: float) -> bytes:
    """The whole response to a command that may take this long.

    Raises DaemonError where there is none or it is none, UsageError for a socket path that is too long.
    """
    deadline = time.monotonic() + seconds
    with _opened(target) as descriptor:
        try:
            written = os.write(descriptor, command)
        except OSError:
            written = -1
        if written != len(command):
            raise DaemonError("Write to file descriptor failed.")
        response = b""
        while len(response) < _size(response):
            if not select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise DaemonError(f"TPM did not respond after {seconds:.0f} seconds.")
            piece = _read(descriptor)
            if not piece:
                raise DaemonError("Returned packet is too short.")
            response += piece
    if len(response) != int.from_bytes(response[2:6], "big"):
        raise DaemonError("Malformed response.")
    return response


def _size(response: bytes) -> int:
    """The bytes in a whole response, as far as its beginning tells."""
    if len(response) < HEAD_SIZE:
        return HEAD_SIZE
    return max(int.from_bytes(response[2:6], "big"), HEAD_SIZE)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, LONGEST_RESPONSE)
    except OSError as error:
        raise DaemonError("Read from file descriptor failed.") from error


@contextmanager
def _opened(target: Target) -> Iterator[int]:
    descriptor = _open(target)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(target: Target) -> int:
    match target:
        case Device(path):
            try:
                return os.open(path, os.O_RDWR)
            except OSError as error:
                raise DaemonError(f"Unable to open device '{path}'.") from error
        case Unix(path):
            try:
                return _descriptor(connect_unix(path))
            except OSError as error:
                raise DaemonError("Could not connect using UnixIO socket.") from error
        case Tcp(host, port):
            try:
                return _descriptor(connect_tcp(host, port))
            except socket.gaierror as error:
                raise DaemonError(f"getaddrinfo failed on host '{host}': {error.strerror}") from error
            except (OSError, OverflowError) as error:
                raise DaemonError("Could not connect using TCP socket.") from error


def _descriptor(connected: socket.socket) -> int:
    connected.setblocking(True)
    return connected.detach()
