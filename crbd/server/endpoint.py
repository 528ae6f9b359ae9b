"""Where a channel is reached: the text on the command line, and the socket it becomes.

    unix:PATH[,mode=0660]     a UNIX stream socket, made with that mode (0600 if none is given) and removed at exit
    tcp:HOST:PORT             TCP; an IPv6 address stands in brackets: tcp:[::1]:2321, and a link-local one with its
                              interface: tcp:[fe80::1%eth0]:2321
    fd:NUMBER                 a descriptor handed over by the parent: a listening socket, or one connected client

A stale UNIX socket that nobody listens on is replaced; anything else at the path is left alone and refused. swtpm
replaces whatever lies there, and does not look first: `UnixEndpoint.replace`.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crbd.errors import EndpointError, UsageError

log = logging.getLogger(__name__)

BACKLOG = 16
DEFAULT_MODE = 0o600
UNIX_PATH_MAX = 107
"""Bytes in a UNIX socket's path (unix(7): 108 with the NUL)."""

_FORMS = "use unix:PATH, tcp:HOST:PORT or fd:NUMBER"
_TCP = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d+)")


@dataclass(frozen=True, slots=True)
class UnixEndpoint:
    """A UNIX stream socket at `path`; `mode` are its permission bits, whatever the umask says."""

    path: Path
    mode: int = DEFAULT_MODE
    uid: int | None = None
    """Owner of the socket; None leaves it to the system. Another than one's own needs root."""
    gid: int | None = None
    replace: bool = False
    """Remove what lies at the path, even a regular file or a socket in use: what callers of swtpm rely on. Nothing is
    asked by connecting: that alone ends an swtpm that was started with `terminate`."""

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True, slots=True)
class TcpEndpoint:
    """A TCP port; `host` is a name or an IPv4 or IPv6 address."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class DescriptorEndpoint:
    """A descriptor inherited from the parent."""

    number: int

    def __str__(self) -> str:
        return f"fd:{self.number}"


Endpoint = UnixEndpoint | TcpEndpoint | DescriptorEndpoint


@dataclass(slots=True)
class OpenEndpoint:
    """What an endpoint became:

    a non-blocking socket that listens, or is connected to the one client it will ever have.
    """

    endpoint: Endpoint
    socket: socket.socket
    listening: bool
    identity: tuple[int, int] | None = None
    """Device and inode of a path that is to be removed at the end."""
    stays: bool = False
    """Set where the socket lives on in another process: its path is left then."""


def parse_endpoint(text: str, option: str) -> Endpoint:
    """Parse the value of `option`. Raises UsageError."""
    kind, _, rest = text.partition(":")
    if kind == "unix" and rest:
        return _parse_unix(rest, option)
    if kind == "tcp" and (match := _TCP.fullmatch(rest)):
        port = int(match["port"])
        if port > 0xFFFF:
            raise UsageError(f"{option} {text}: there is no port {port}", "ports go from 0 to 65535")
        return TcpEndpoint(match["v6"] or match["host"], port)
    if kind == "fd" and rest.isdecimal():
        return DescriptorEndpoint(int(rest))
    raise UsageError(f"{option} {text!r} is not an endpoint", _FORMS)


def _parse_unix(rest: str, option: str) -> UnixEndpoint:
    path, _, setting = rest.partition(",mode=")
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise UsageError(
            f"{option}: the path of a UNIX socket has at most {UNIX_PATH_MAX} bytes, {path} has more",
            "use a shorter one",
        )
    if not setting:
        return UnixEndpoint(Path(path))
    try:
        mode = int(setting, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise UsageError(f"{option}: {setting!r} is no file mode", "give it in octal, as in mode=0660")
    return UnixEndpoint(Path(path), mode)


@contextmanager
def opened(endpoint: Endpoint, option: str) -> Iterator[OpenEndpoint]:
    """The endpoint's socket for as long as the block runs;

    a UNIX socket made here is removed afterwards. Raises EndpointError.
    """
    match endpoint:
        case UnixEndpoint():
            listener, identity = _listen_unix(endpoint, option)
            listening_there = OpenEndpoint(endpoint, listener, listening=True, identity=identity)
            try:
                yield listening_there
            finally:
                listener.close()
                if not listening_there.stays:
                    _remove(endpoint.path, identity)
        case TcpEndpoint():
            with _listen_tcp(endpoint, option) as listener:
                yield OpenEndpoint(endpoint, listener, listening=True)
        case DescriptorEndpoint():
            with _take(endpoint, option) as taken:
                listening = bool(taken.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
                yield OpenEndpoint(endpoint, taken, listening)


@contextmanager
def adopted(endpoint: Endpoint, descriptor: int, identity: tuple[int, int] | None) -> Iterator[OpenEndpoint]:
    """As `opened`, for a listening socket that the process before this one had opened."""
    with socket.socket(fileno=descriptor) as listener:
        listener.setblocking(False)
        listening_there = OpenEndpoint(endpoint, listener, listening=True, identity=identity)
        try:
            yield listening_there
        finally:
            listener.close()
            if identity is not None and isinstance(endpoint, UnixEndpoint) and not listening_there.stays:
                _remove(endpoint.path, identity)


def is_at(endpoint: Endpoint, descriptor: int, identity: tuple[int, int] | None) -> bool:
    """Whether a listening socket is where `opened` would make one; `identity` as in `adopted`."""
    listener = socket.socket(fileno=descriptor)
    try:
        address = listener.getsockname()
        match endpoint:
            case UnixEndpoint():
                status = endpoint.path.lstat()
                return address == str(endpoint.path) and (status.st_dev, status.st_ino) == identity
            case TcpEndpoint():
                wanted = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)[0][4]
                return wanted[0] == address[0] and wanted[1] in (0, address[1])
            case DescriptorEndpoint():
                return False
    except OSError:
        return False
    finally:
        listener.detach()


def _listen_unix(endpoint: UnixEndpoint, option: str) -> tuple[socket.socket, tuple[int, int]]:
    path = endpoint.path
    if endpoint.replace:
        _remove_whatever_is_there(path, option)
    else:
        _clear_stale(path, option)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode has to be right from the first moment: a chmod afterwards leaves a window. No other thread runs yet.
    umask = os.umask(0o777 & ~endpoint.mode)
    bound = False
    try:
        listener.bind(str(path))
        bound = True
        if endpoint.uid is not None or endpoint.gid is not None:
            # Nobody can connect before it listens: there is no moment with the wrong owner.
            os.chown(path, -1 if endpoint.uid is None else endpoint.uid, -1 if endpoint.gid is None else endpoint.gid)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        status = path.lstat()
    except OSError as error:
        listener.close()
        if bound:
            path.unlink(missing_ok=True)
        raise EndpointError(
            f"{option} {endpoint}: {error.strerror}",
            "name a path in a directory that this user may write, and an owner that it may give away to",
        ) from error
    finally:
        os.umask(umask)
    return listener, (status.st_dev, status.st_ino)


def _remove_whatever_is_there(path: Path, option: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise EndpointError(
            f"{option} unix:{path}: what lies there cannot be removed: {error.strerror}", "name another path"
        ) from error


def _clear_stale(path: Path, option: str) -> None:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise EndpointError(
            f"{option} unix:{path}: {error.strerror}", "name a path that this user may reach"
        ) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise EndpointError(f"{option} unix:{path} exists and is no socket", "remove it, or name another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(str(path))
    if result != errno.ECONNREFUSED:
        raise EndpointError(
            f"{option} unix:{path} is in use by another process", "stop that process, or name another path"
        )
    path.unlink(missing_ok=True)


def _remove(path: Path, identity: tuple[int, int]) -> None:
    """Remove our socket, but not one that somebody else has put in its place since."""
    try:
        status = path.lstat()
        if (status.st_dev, status.st_ino) == identity:
            path.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("the socket %s stays behind: %s", path, error.strerror)


def _listen_tcp(endpoint: TcpEndpoint, option: str) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            endpoint.host, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise EndpointError(f"{option} {endpoint}: {error.strerror}", "give an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise EndpointError(
            f"{option} {endpoint}: {error.strerror}", "give an address of this machine and a port that is free"
        ) from error
    return listener


def _take(endpoint: DescriptorEndpoint, option: str) -> socket.socket:
    try:
        taken = socket.socket(fileno=endpoint.number)
    except OSError as error:
        raise EndpointError(f"{option} {endpoint}: {error.strerror}", "hand over an open stream socket") from error
    if taken.type != socket.SOCK_STREAM:
        taken.detach()
        raise EndpointError(f"{option} {endpoint} is no stream socket", "hand over an open stream socket")
    taken.set_inheritable(False)
    taken.setblocking(False)
    return taken
