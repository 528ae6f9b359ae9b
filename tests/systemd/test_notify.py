"""What a service manager hears from crbd, and sockets that it passes."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from tests.cli.process import end, wait_until
from tests.cli.test_reload import CAPABILITIES, GET_CAPABILITY, Client, sockets
from tests.engine import commands as c

from .service_manager import ServiceManager, service_manager


def listening(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    return listener


def failure(
    manager: ServiceManager, arguments: list[str | Path], passed: dict[str, socket.socket] | None = None
) -> list[str]:
    """What is heard of a start that fails, and nothing else."""
    with pytest.raises(AssertionError, match="crbd: "), manager.service(*arguments, sockets=passed):
        pass
    wait_until(lambda: any(line.startswith("ERRNO=") for line in manager.heard), "ERRNO")
    return manager.heard


def test_a_life(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager:
        with manager.service("--ephemeral", *sockets(tmp_path)) as process:
            assert manager.heard[1].startswith("STATUS=serving the TPM in the ephemeral store at unix:")
            with Client(tmp_path / "ctrl") as ctrl:
                assert ctrl.upgrade()[0]
            wait_until(lambda: len(manager.heard) >= 7, "what is said when it serves again")
            assert [line.partition("=")[0] for line in manager.heard[2:]] == [
                *("RELOADING", "MONOTONIC_USEC", "STATUS"),
                *("READY", "STATUS"),
            ]
            assert end(process)[0] == 0
        assert manager.heard[-2:] == ["STOPPING=1", "STATUS=shutting the TPM down"]


@pytest.mark.slow
def test_the_watchdog_hears_of_loop_and_lock(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager:
        environment = {"WATCHDOG_USEC": "150000"}
        with manager.service("--ephemeral", *sockets(tmp_path), environment=environment) as process:
            wait_until(lambda: manager.heard.count("WATCHDOG=1") > 2, "three signs of life")
            process.send_signal(19)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            heard = manager.heard.count("WATCHDOG=1")
            with Client(tmp_path / "data"):
                process.send_signal(18)
                wait_until(lambda: manager.heard.count("WATCHDOG=1") > heard, "another one")
            assert end(process)[0] == 0


def test_a_start_that_fails(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager:
        heard = failure(manager, ["--state", tmp_path / "none", *sockets(tmp_path)])
        assert heard[0].startswith(f"STATUS=there is no TPM state in {tmp_path / 'none'}")
        assert heard[1] == f"ERRNO={errno.ENOENT}"
        heard = failure(manager, ["--ephemeral"])
        assert heard == ["STATUS=there is no socket to serve: give --ctrl, --data or both, or --registers", "ERRNO=22"]


def test_sockets_that_a_socket_unit_has(tmp_path: Path) -> None:
    """By their names; an upgrade and a restart keep them, and they outlive the daemon."""
    with (
        service_manager(tmp_path) as manager,
        listening(tmp_path / "ctrl") as ctrl,
        listening(tmp_path / "data") as data,
    ):
        passed = {"data": data, "ctrl": ctrl}
        arguments = ["--ephemeral", "--fd-store", "--flags", "startup-clear"]
        with Client(tmp_path / "data") as client, Client(tmp_path / "ctrl") as other:
            with manager.service(*arguments, sockets=passed) as process:
                assert c.code(client.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
                before = client.run(c.pcr_read(16))
                done, said = other.upgrade()
                assert done, said
                assert end(process)[0] == 0
            assert set(manager.kept) == {"handover", "link.0", "link.1"}
            with Client(tmp_path / "ctrl") as meanwhile:
                meanwhile.socket.sendall(GET_CAPABILITY)
                with manager.service(*arguments, sockets=passed) as process:
                    assert client.run(c.pcr_read(16)) == before
                    assert meanwhile.receive(8) == CAPABILITIES
                    assert end(process)[0] == 0
        assert (tmp_path / "ctrl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("names", "arguments", "says"),
    [
        (["crbd@vm1.socket"], [], "passes a socket called crbd@vm1.socket: set FileDescriptorName="),
        (["ctrl"], ["--ctrl", "unix:{place}/other"], "--ctrl is given, and a socket unit has a socket for it too"),
    ],
)
def test_sockets_that_nobody_knows_what_to_do_with(
    tmp_path: Path, names: list[str], arguments: list[str], says: str
) -> None:
    with service_manager(tmp_path) as manager, listening(tmp_path / "socket") as listener:
        given: list[str | Path] = ["--ephemeral", *(each.format(place=tmp_path) for each in arguments)]
        heard = failure(manager, given, dict.fromkeys(names, listener))
        assert says in heard[0]


def test_fd_store_without_a_manager(tmp_path: Path) -> None:
    with service_manager(tmp_path) as manager:
        environment = {"NOTIFY_SOCKET": ""}
        with (
            pytest.raises(AssertionError, match="--fd-store: no service manager listens"),
            manager.service("--ephemeral", "--fd-store", *sockets(tmp_path), environment=environment),
        ):
            pass
