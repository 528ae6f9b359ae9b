"""What the end of a connection means to `swtpm`: --terminate, terminate, disconnect, and what implies them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from .swtpm_processes import (
    DONE,
    GET_CAPABILITY,
    GET_RANDOM,
    INIT,
    PATIENCE,
    STARTUP_CLEAR,
    SUCCESS_HEAD,
    ask,
    connected,
    end,
    free_port,
    is_at_end,
    receive,
    run_command,
    running,
)

pytestmark = pytest.mark.slow


def test_terminate_ends_with_the_data_client(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with running(tmp_path, "--server", f"type=unixio,path={data}", "-t", "--flags", "startup-clear") as process:
        with connected(data) as client:
            assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
            assert process.poll() is None
        assert process.wait(PATIENCE) == 0
    assert not data.exists()


def test_terminate_ends_with_a_client_that_came_over_the_control_channel(tmp_path: Path) -> None:
    ctrl = tmp_path / "ctrl"
    ours, theirs = socket.socketpair()
    with (
        running(tmp_path, "--ctrl", f"type=unixio,path={ctrl}", "--terminate") as process,
        connected(ctrl) as client,
        ours,
    ):
        client.sendall(INIT)
        assert receive(client, 4) == DONE
        socket.send_fds(client, [bytes.fromhex("00000010")], [theirs.fileno()])
        theirs.close()
        assert receive(client, 4) == DONE
        ours.settimeout(PATIENCE)
        assert run_command(ours, STARTUP_CLEAR) == SUCCESS_HEAD
        ours.close()
        assert process.wait(PATIENCE) == 0


def test_ctrl_terminate_ends_with_the_control_client(tmp_path: Path) -> None:
    ctrl = tmp_path / "ctrl"
    with running(tmp_path, "--ctrl", f"type=unixio,path={ctrl},terminate") as process:
        assert len(ask(ctrl, GET_CAPABILITY, 8)) == 8
        assert process.wait(PATIENCE) == 0


def test_a_client_that_waits_for_the_channel_ends_nothing(tmp_path: Path) -> None:
    ctrl = tmp_path / "ctrl"
    with running(tmp_path, "--ctrl", f"type=unixio,path={ctrl},terminate") as process, connected(ctrl) as client:
        client.sendall(GET_CAPABILITY)
        assert len(receive(client, 8)) == 8
        for _ in range(3):
            with connected(ctrl) as waiting:
                waiting.shutdown(socket.SHUT_WR)
                assert is_at_end(waiting)
        client.sendall(GET_CAPABILITY)
        assert len(receive(client, 8)) == 8
        assert process.poll() is None
        client.close()
        assert process.wait(PATIENCE) == 0


def test_without_terminate_clients_come_and_go(tmp_path: Path) -> None:
    ctrl, data = tmp_path / "ctrl", tmp_path / "data"
    arguments = ("--ctrl", f"type=unixio,path={ctrl}", "--server", f"type=unixio,path={data}")
    with running(tmp_path, *arguments, "--flags", "startup-clear") as process:
        for _ in range(3):
            with connected(data):
                pass
            assert len(ask(ctrl, GET_CAPABILITY, 8)) == 8
        with connected(data) as client:
            assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
        assert end(process) == 0


@pytest.mark.parametrize("form", ["-p", "--server"])
def test_disconnect_closes_after_each_answer(tmp_path: Path, form: str) -> None:
    port = free_port()
    arguments = ("-p", str(port)) if form == "-p" else ("--server", f"type=tcp,port={port},disconnect")
    with running(tmp_path, *arguments, "--flags", "startup-clear") as process:
        for _ in range(3):
            with connected(port) as client:
                assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
                assert is_at_end(client)
        with connected(port) as client:
            # Two in one write: one answer.
            assert run_command(client, GET_RANDOM + GET_RANDOM)[6:10] == bytes(4)
            assert is_at_end(client)
        assert end(process) == 0


def test_a_server_stays_connected(tmp_path: Path) -> None:
    port = free_port()
    with running(tmp_path, "--server", f"type=tcp,port={port}", "--flags", "startup-clear") as process:
        with connected(port) as client:
            for _ in range(3):
                assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
            client.sendall(GET_RANDOM)
            client.shutdown(socket.SHUT_WR)
            assert len(receive(client, 1000)) == len(GET_RANDOM) + 16
        assert end(process) == 0


@pytest.mark.parametrize("form", ["--fd", "--server"])
def test_a_connected_descriptor_implies_terminate(tmp_path: Path, form: str) -> None:
    ours, theirs = socket.socketpair()
    number = theirs.fileno()
    arguments = ("--fd", str(number)) if form == "--fd" else ("--server", f"type=tcp,fd={number}")
    with ours, running(tmp_path, *arguments, "--flags", "startup-clear", pass_fds=[number]) as process:
        theirs.close()
        ours.settimeout(PATIENCE)
        assert run_command(ours, GET_RANDOM)[6:10] == bytes(4)
        ours.close()
        assert process.wait(PATIENCE) == 0


def test_a_listening_descriptor(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        number = listener.fileno()
        with running(tmp_path, "--ctrl", f"type=tcp,fd={number}", pass_fds=[number]) as process:
            for _ in range(2):
                with connected(listener.getsockname()[1]) as client:
                    client.sendall(GET_CAPABILITY)
                    assert len(receive(client, 8)) == 8
            assert end(process) == 0


def test_a_control_client_as_a_descriptor_does_not_imply_terminate(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    data = tmp_path / "data"
    arguments = ("--ctrl", f"type=unixio,clientfd={theirs.fileno()}", "--server", f"type=unixio,path={data}")
    with ours, running(tmp_path, *arguments, pass_fds=[theirs.fileno()]) as process:
        theirs.close()
        ours.settimeout(PATIENCE)
        ours.sendall(INIT)
        assert receive(ours, 4) == DONE
        ours.close()
        with connected(data) as client:
            assert run_command(client, STARTUP_CLEAR) == SUCCESS_HEAD
        assert end(process) == 0


def test_ctrl_terminate_ends_with_a_client_that_said_nothing(tmp_path: Path) -> None:
    ctrl = tmp_path / "ctrl"
    with running(tmp_path, "--ctrl", f"type=unixio,path={ctrl},terminate") as process:
        with connected(ctrl):
            pass
        assert process.wait(PATIENCE) == 0


def test_disconnect_counts_as_the_end_of_the_client(tmp_path: Path) -> None:
    """`-p PORT -t` answers one command, as swtpm does."""
    port = free_port()
    with running(tmp_path, "-p", str(port), "-t", "--flags", "startup-clear") as process:
        with connected(port) as client:
            assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
            assert is_at_end(client)
        assert process.wait(PATIENCE) == 0
