"""Landlock around a daemon: what an intruder in it reaches. The filter is off where it would answer first."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest

from crbd.errors import WallError
from crbd.server import syscalls
from crbd.server.landlock import restrict
from crbd.server.seccomp import Action
from crbd.server.walls import Walls, Wanted

from .walled import CHECKOUT, serving

VERSION = syscalls.landlock_version()
needs_landlock = pytest.mark.skipif(VERSION == 0, reason="this kernel has no Landlock, or it is switched off")


@needs_landlock
def test_an_intruder_reaches_its_own_state_and_no_other_file(tmp_path: Path) -> None:
    place, neighbour = tmp_path / "one", tmp_path / "other"
    place.mkdir()
    neighbour.mkdir()
    (neighbour / "tpm.crbd").write_bytes(b"secret")
    with serving(place, "--landlock", "on") as daemon:
        for _ in range(2):
            assert daemon.attempt(f"read {neighbour / 'tpm.crbd'}") == "EACCES"
            assert daemon.attempt(f"write {neighbour / 'tpm.crbd'}") == "EACCES"
            assert daemon.attempt(f"rename {neighbour / 'tpm.crbd'} {neighbour / 'away'}") == "EACCES"
            assert daemon.attempt(f"write {neighbour / 'new'}") == "EACCES"
            assert daemon.attempt(f"list {neighbour}") == "EACCES"
            assert daemon.attempt(f"write {sys.executable}") in {"EACCES", "ETXTBSY"}
            assert daemon.attempt(f"write {CHECKOUT / 'crbd/intruded.py'}") == "EACCES"
            assert daemon.attempt(f"read /proc/{os.getpid()}/environ") == "EACCES"
            assert daemon.attempt(f"write {place / 'beside-the-sockets'}") == "EACCES"
            assert daemon.attempt(f"write {place / 'state/own'}").startswith("done")
            done, said = daemon.upgrade()
            assert done, said
        daemon.process.terminate()
        assert daemon.process.wait(20) == 0
    assert sorted(path.name for path in place.iterdir()) == ["state"], (
        "sockets and pid file are removed through the wall"
    )


@needs_landlock
def test_programs_are_started_where_programs_lie(tmp_path: Path) -> None:
    shutil.copy("/bin/true", tmp_path / "planted")
    (tmp_path / "place").mkdir()
    with serving(tmp_path / "place", "--landlock", "on") as daemon:
        assert daemon.attempt(f"execute {tmp_path / 'planted'}") == "EACCES"
        assert daemon.attempt("execute /bin/true") == "done 0"


@pytest.mark.skipif(VERSION < 4, reason="Landlock knows of TCP from its version 4 on")
@pytest.mark.slow
def test_nobody_is_called(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with serving(tmp_path, "--landlock", "on", "--seccomp", "none", state=False) as daemon:
            assert daemon.attempt(f"connect {port}") == "EACCES"
        with serving(tmp_path, "--landlock", "off", "--seccomp", "none", state=False) as daemon:
            assert daemon.attempt(f"connect {port}") == "done connected"


@pytest.mark.skipif(VERSION < 6, reason="Landlock knows of signals from its version 6 on")
def test_no_other_process_gets_signals(tmp_path: Path) -> None:
    with serving(tmp_path, "--landlock", "on", state=False) as daemon:
        assert daemon.attempt(f"kill {os.getpid()}") == "EPERM"
        assert daemon.attempt(f"kill {daemon.process.pid}") == "done sent"


@needs_landlock
@pytest.mark.slow
@pytest.mark.parametrize("beside", [True, False], ids=["beside it", "elsewhere"])
def test_an_upgrade_follows_a_link_that_is_turned(tmp_path: Path, beside: bool) -> None:
    """Releases in places of their own, and the daemon started by a link, as docs/upgrade.md advises."""
    releases = tmp_path / ("opt" if beside else "releases")
    for release in ("1.0", "1.1"):
        script = releases / release / "bin" / "crbd"
        script.parent.mkdir(parents=True)
        script.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(CHECKOUT)!r})\nimport crbd\n"
            f"crbd.__version__ = {release!r}\nfrom crbd.cli.main import main\nsys.exit(main())\n"
        )
        script.chmod(0o755)
    current = tmp_path / "opt" / "current"
    current.parent.mkdir(exist_ok=True)
    current.symlink_to(releases / "1.0")
    place = tmp_path / "place"
    place.mkdir()
    with serving(place, "--landlock", "on", program=(str(current / "bin" / "crbd"),), intruded=False) as daemon:
        for release in ("1.1", "1.0"):
            current.unlink()
            current.symlink_to(releases / release)
            done, said = daemon.upgrade()
            assert done, said
            assert said.startswith(f"crbd {release} goes on")


@needs_landlock
def test_off_is_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"123")
    with serving(tmp_path, "--landlock", "off", state=False) as daemon:
        assert daemon.attempt(f"read {tmp_path / 'file'}") == "done 3"


@needs_landlock
@pytest.mark.slow
@pytest.mark.parametrize("layout", ["crbd", "swtpm", "linear"])
def test_every_layout_is_kept_and_found_again(tmp_path: Path, layout: str) -> None:
    for _ in range(2):
        with serving(tmp_path, "--landlock", "on", "--layout", layout) as daemon:
            done, said = daemon.upgrade()
            assert done, said
            daemon.process.terminate()
            _, errors = daemon.process.communicate(timeout=20)
            assert (daemon.process.returncode, errors) == (0, "")


def test_a_wall_that_is_asked_for_and_cannot_be_had_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(syscalls, "landlock_version", lambda: 0)
    monkeypatch.setattr(syscalls, "prctl", lambda option, argument: None)
    assert restrict([]) == 0
    Walls(Action.NONE, False, Wanted.IF_THERE, (), None).raise_all()
    with pytest.raises(WallError, match="--landlock off"):
        Walls(Action.NONE, False, Wanted.REQUIRED, (), None).raise_all()
    monkeypatch.setattr(syscalls, "machine", lambda: "riscv64")
    Walls(Action.KILL, False, Wanted.OFF, (), None).raise_all()
    with pytest.raises(WallError, match="riscv64"):
        Walls(Action.KILL, True, Wanted.OFF, (), None).raise_all()
