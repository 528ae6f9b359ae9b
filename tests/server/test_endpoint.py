"""Endpoints: the texts and what they become, and every way in which a socket cannot be had."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from crbd.errors import EndpointError, UsageError
from crbd.server.endpoint import DescriptorEndpoint, Endpoint, TcpEndpoint, UnixEndpoint, opened, parse_endpoint

GOOD: dict[str, Endpoint] = {
    "unix:/run/tpm": UnixEndpoint(Path("/run/tpm")),
    "unix:relative": UnixEndpoint(Path("relative")),
    "unix:/run/tpm,mode=0660": UnixEndpoint(Path("/run/tpm"), 0o660),
    "unix:/run/with,comma": UnixEndpoint(Path("/run/with,comma")),
    "tcp:127.0.0.1:2321": TcpEndpoint("127.0.0.1", 2321),
    "tcp:localhost:0": TcpEndpoint("localhost", 0),
    "tcp:[::1]:2321": TcpEndpoint("::1", 2321),
    "fd:7": DescriptorEndpoint(7),
}


@pytest.mark.parametrize("text", GOOD)
def test_good_texts(text: str) -> None:
    assert parse_endpoint(text, "--ctrl") == GOOD[text]
    assert parse_endpoint(str(GOOD[text]), "--ctrl") in (GOOD[text], UnixEndpoint(Path("/run/tpm")))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "unix:",
        "/run/tpm",
        "tcp:2321",
        "tcp:host:",
        "tcp:::1:2321",
        "tcp:[::1]",
        "tcp:host:65536",
        "fd:",
        "fd:-1",
        "fd:seven",
        "unix:/run/tpm,mode=9",
        "unix:/run/tpm,mode=10000",
        "unix:/" + "x" * 107,
    ],
)
def test_bad_texts(text: str) -> None:
    with pytest.raises(UsageError, match="--ctrl") as caught:
        parse_endpoint(text, "--ctrl")
    assert caught.value.remedy
    assert "\n" not in str(caught.value)


def test_a_unix_socket_has_its_mode_and_is_removed(tmp_path: Path) -> None:
    for mode in (0o600, 0o660, 0o777):
        path = tmp_path / "socket"
        with opened(UnixEndpoint(path, mode), "--ctrl") as endpoint:
            assert endpoint.listening
            assert stat.S_IMODE(path.lstat().st_mode) == mode
            assert not endpoint.socket.get_inheritable()
        assert not path.exists()


def test_a_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with opened(UnixEndpoint(path), "--ctrl"), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_in_use_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with (
        opened(UnixEndpoint(path), "--ctrl"),
        pytest.raises(EndpointError, match="in use by another process"),
        opened(UnixEndpoint(path), "--data"),
    ):
        pass
    assert not path.exists()


def test_a_file_at_the_path_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("precious")
    with pytest.raises(EndpointError, match="is no socket"), opened(UnixEndpoint(path), "--ctrl"):
        pass
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(EndpointError, match="--ctrl"), opened(UnixEndpoint(tmp_path / "no" / "socket"), "--ctrl"):
        pass


def test_a_socket_that_somebody_else_put_in_our_place_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as theirs, opened(UnixEndpoint(path), "--ctrl"):
        path.unlink()
        theirs.bind(str(path))
    assert path.exists()
    with opened(UnixEndpoint(path), "--ctrl"):
        path.unlink()


def test_a_tcp_port_in_use() -> None:
    with opened(TcpEndpoint("127.0.0.1", 0), "--data") as first:
        taken = TcpEndpoint("127.0.0.1", first.socket.getsockname()[1])
        with pytest.raises(EndpointError, match="in use"), opened(taken, "--data"):
            pass


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(EndpointError, match="--data"), opened(TcpEndpoint("192.0.2.1", 2321), "--data"):
        pass
    with pytest.raises(EndpointError, match="--data"), opened(TcpEndpoint("no.such.host.invalid", 1), "--data"):
        pass


def test_descriptors_that_cannot_be_used() -> None:
    with pytest.raises(EndpointError, match="fd:9999"), opened(DescriptorEndpoint(9999), "--data"):
        pass
    reading, writing = os.pipe()
    with pytest.raises(EndpointError, match="fd:"), opened(DescriptorEndpoint(reading), "--data"):
        pass
    datagram = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    with (
        pytest.raises(EndpointError, match="no stream socket"),
        opened(DescriptorEndpoint(datagram.fileno()), "--data"),
    ):
        pass
    datagram.close()
    os.close(reading)
    os.close(writing)
