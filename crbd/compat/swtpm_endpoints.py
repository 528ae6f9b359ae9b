"""Where `--ctrl`, `--server`, `--port`, `--fd` and TPM_PORT say that the two channels are (swtpm 0.11: common.c)."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crbd.compat.swtpm_grammar import Values
from crbd.compat.swtpm_options import CommandLine
from crbd.errors import UsageError
from crbd.server.endpoint import UNIX_PATH_MAX, DescriptorEndpoint, Endpoint, TcpEndpoint, UnixEndpoint

SOCKET_MODE = 0o770
"""Permission bits of a UNIX socket, unless `mode=` says otherwise."""
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The channels, and what the end of a connection means."""

    ctrl: Endpoint | None = None
    data: Endpoint | None = None
    disconnect: bool = False
    end_with_data_client: bool = False
    end_with_ctrl_client: bool = False


def endpoints_of(line: CommandLine, environment: Mapping[str, str]) -> Endpoints:
    """What a command line comes to; nothing is opened. Raises UsageError, in swtpm's words."""
    ctrl = line.values("--ctrl")
    ctrl_endpoint = None if ctrl is None else _ctrl(ctrl)
    data, implies_end = _data(line, environment, alone=ctrl is None)
    server = line.values("--server")
    return Endpoints(
        ctrl=ctrl_endpoint,
        data=data,
        disconnect=line.port is not None or (server is not None and server.flag("disconnect")),
        end_with_data_client=line.terminate or implies_end,
        end_with_ctrl_client=ctrl is not None and ctrl.flag("terminate"),
    )


def _data(line: CommandLine, environment: Mapping[str, str], *, alone: bool) -> tuple[Endpoint | None, bool]:
    """The data channel, and whether its form implies `--terminate`."""
    server = line.values("--server")
    endpoint: Endpoint | None = None
    if line.port is not None:
        endpoint = _tcp(line.port, _LOOPBACK, None)
    elif server is not None:
        endpoint = _server(server, environment)
    if isinstance(endpoint, DescriptorEndpoint):
        return endpoint, server is not None and server.string("type") != "unixio"
    if line.client_fd is not None:
        return DescriptorEndpoint(line.client_fd), True
    if endpoint is None and alone and "TPM_PORT" in environment:
        # swtpm(8) promises it; the program itself hears TPM_PORT only where --server names no port.
        return _tcp(_port_in(environment), _LOOPBACK, None), False
    return endpoint, False


def _ctrl(values: Values) -> Endpoint:
    kind = values.string("type")
    if kind is None:
        raise UsageError("Missing type parameter for control channel")
    if kind == "unixio":
        if (number := values.descriptor("fd")) is not None:
            return _descriptor(number, "UnixIO control channel")
        if (number := values.descriptor("clientfd")) is not None:
            return _descriptor(number, "UnixIO client control channel")
        return _unix(values, "Missing path and fd options for UnixIO control channel")
    if kind == "tcp":
        if (number := values.descriptor("fd")) is not None:
            return _descriptor(number, "TCP control channel")
        port = values.number("port")
        if port is None or port < 0:
            raise UsageError("Missing port and fd options for TCP control channel")
        if port > 0xFFFF:
            raise UsageError("TCP control channel port outside valid range")
        return _tcp(port, values.string("bindaddr") or _LOOPBACK, values.string("ifname"))
    raise UsageError(f"Unsupported control channel type: {kind}")


def _server(values: Values, environment: Mapping[str, str]) -> Endpoint:
    kind = values.string("type") or "tcp"
    number = values.descriptor("fd")
    if kind == "unixio":
        if number is not None:
            return _descriptor(number, "UnixIO control channel")
        return _unix(values, "Missing path and file descriptor option for UnixIO socket")
    if kind != "tcp":
        raise UsageError(f"Unsupported socket type: {kind}")
    if number is not None:
        return _descriptor(number, "TCP socket")
    port = values.number("port")
    if port is None or port == -1:
        port = _port_in(environment)
    if port < 0:
        raise UsageError("No valid port number provided for TCP socket.")
    if port > 0xFFFF:
        raise UsageError("TCP socket port outside valid range")
    return _tcp(port, values.string("bindaddr") or _LOOPBACK, values.string("ifname"))


def _port_in(environment: Mapping[str, str]) -> int:
    match = re.match(r"\s*[+-]?[0-9]+", environment.get("TPM_PORT", ""))
    if match is None:
        raise UsageError("TPM_PORT is not set or contains an invalid integer value.")
    return int(match[0])


def _unix(values: Values, missing: str) -> UnixEndpoint:
    path = values.string("path")
    if path is None:
        raise UsageError(missing)
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise UsageError("Path for UnixIO socket is too long")
    mode = values.number("mode")
    return UnixEndpoint(
        Path(path), SOCKET_MODE if mode is None else mode, values.number("uid"), values.number("gid"), replace=True
    )


def _tcp(port: int, address: str, interface: str | None) -> TcpEndpoint:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise UsageError(f"Could not parse the bind address '{address}'") from None
    if parsed.version == 4 or not parsed.is_link_local:
        return TcpEndpoint(address, port)
    if interface is None:
        raise UsageError("Missing interface name for link local address")
    try:
        socket.if_nametoindex(interface)
    except OSError as error:
        raise UsageError(
            f"Could not convert interface name '{interface}' to index: {error.strerror or 'No such device'}"
        ) from None
    return TcpEndpoint(f"{address}%{interface}", port)


def _descriptor(number: int, what: str) -> DescriptorEndpoint:
    try:
        usable = stat.S_ISSOCK(os.fstat(number).st_mode)
    except OSError:
        usable = False
    if not usable:
        raise UsageError(f"Bad filedescriptor {number} for {what}")
    return DescriptorEndpoint(number)
