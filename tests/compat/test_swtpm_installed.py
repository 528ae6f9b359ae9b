"""`crbd compat-path` and the launchers as pip installs them: from a wheel, editable, and for another user."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.cli.compat_path import find_directory
from crbd.compat.launch import COMMANDS

from .swtpm_processes import CHECKOUT, DONE, INIT, LAUNCHERS, PATIENCE, ask, has_pid, killed, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

NOBODY = 65534


def _run(*command: str | Path, user: int | None = None) -> str:
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, timeout=240, cwd="/", user=user
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Where everybody may read."""
    made = Path(tempfile.mkdtemp(prefix="crbd-installed-", dir="/var/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture(scope="module", params=["wheel", "editable"])
def prefix(request: pytest.FixtureRequest, place: Path) -> Path:
    """A virtual environment with crbd in it; what crbd depends on comes from the one that runs the tests."""
    source = place / f"source-{request.param}"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    for name in ("crbd", "libexec"):
        shutil.copytree(CHECKOUT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    prefix: Path = place / request.param
    _run(sys.executable, "-m", "venv", prefix)
    paths = {"base": str(prefix), "platbase": str(prefix)}
    site_packages = Path(sysconfig.get_path("purelib", "venv", paths))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    how = ["--editable"] if request.param == "editable" else []
    _run(prefix / "bin/pip", "install", "--quiet", "--no-deps", *how, source)
    return prefix


def test_compat_path(prefix: Path) -> None:
    """Nothing is written when it is printed: another user can do it as well."""
    directory = Path(_run(prefix / "bin/crbd", "compat-path").strip())
    assert directory == prefix / "libexec/crbd"
    assert {path.name for path in directory.iterdir()} == COMMANDS.keys()
    assert not {path.name for path in (prefix / "bin").iterdir()} & COMMANDS.keys()


def test_the_daemon_is_the_process_that_was_started(prefix: Path, tmp_path: Path) -> None:
    ctrl, pid_file = tmp_path / "ctrl", tmp_path / "pid"
    environment = os.environ | {"PATH": f"{prefix / 'libexec/crbd'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    with (
        subprocess.Popen(
            [
                *("swtpm", "socket", "--tpm2", "--tpmstate", f"dir={tmp_path}"),
                *("--pid", f"file={pid_file}", "--ctrl", f"type=unixio,path={ctrl}"),
            ],
            env=environment,
            cwd="/",
        ) as process,
        killed(process),
    ):
        wait_until(lambda: has_pid(pid_file) or process.poll() is not None, "the pid file")
        assert pid_file.read_bytes() == str(process.pid).encode()
        assert ask(ctrl, INIT) == DONE
        process.terminate()
        assert process.wait(PATIENCE) == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs(prefix: Path, name: str, tmp_path: Path) -> None:
    link = tmp_path / name
    link.symlink_to(prefix / "libexec/crbd" / name)
    for launcher in (prefix / "libexec/crbd" / name, link):
        done = subprocess.run([launcher, "--help"], check=False, capture_output=True, text=True, timeout=PATIENCE)
        assert "Traceback" not in done.stderr
        assert name in done.stdout + done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_another_user(prefix: Path) -> None:
    probe = subprocess.run([prefix / "bin/python", "-c", "import trio"], check=False, user=NOBODY, cwd="/")
    if probe.returncode:
        pytest.skip("other users cannot reach the Python that runs the tests")
    assert _run(prefix / "bin/crbd", "compat-path", user=NOBODY).strip() == str(prefix / "libexec/crbd")
    assert "tpm-2.0" in _run(prefix / "libexec/crbd/swtpm", "socket", "--print-capabilities", user=NOBODY)


def test_a_checkout_that_is_not_installed() -> None:
    assert find_directory().is_dir()
    assert _run(LAUNCHERS / "swtpm", "--version").startswith("TPM emulator version")


def test_what_lies_in_the_working_directory_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "crbd.py").write_text("raise SystemExit('imported')\n")
    environment = {**os.environ, "CRBD_PYTHON": sys.executable}
    command = [str(LAUNCHERS / "swtpm"), "--version"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
