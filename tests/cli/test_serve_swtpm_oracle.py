"""Debian's swtpm and `crbd serve` take turns on one TPM, in both of swtpm's layouts and with its keys: what either
wrote the other goes on with, and a file of ours beside it troubles nobody.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.side import SideState
from crbd.store.layout import open_state
from tests.e2e.daemon import dies_with_us, fresh_directory
from tests.engine import commands as c
from tests.state.test_swtpm_oracle import FORMS, key_of, option

from .process import PATIENCE, ask, crbd, end, serving, wait_until

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("swtpm") is None, reason="swtpm is not installed"),
]

LAYOUTS = ["swtpm", "linear"]
ZERO = bytes(8)


@pytest.fixture
def directory() -> Iterator[Path]:
    with fresh_directory() as path:
        yield path


def swtpm_command(place: Path, layout: str, key: tuple[str, ...]) -> list[str]:
    where = f"dir={place / 'state'}" if layout == "swtpm" else f"backend-uri=file://{place / 'state'}"
    sockets = ["--server", f"type=unixio,path={place / 'data'}", "--ctrl", f"type=unixio,path={place / 'ctrl'}"]
    return ["swtpm", "socket", "--tpm2", "--tpmstate", where, "--flags", "startup-clear", *sockets, *key]


@contextmanager
def swtpm(place: Path, layout: str, key: tuple[str, ...]) -> Iterator[Path]:
    """From its start to its SHUTDOWN; gives its data socket."""
    command = [*swtpm_command(place, layout, key), "--pid", f"file={place / 'pid'}"]
    with subprocess.Popen(dies_with_us(command)) as process:
        try:
            wait_until(lambda: (place / "pid").exists() or process.poll() is not None, "swtpm's pid file")
            assert process.poll() is None
            yield place / "data"
            ask(place / "ctrl", (3).to_bytes(4, "big"), 4)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@contextmanager
def ours(place: Path, *options: str) -> Iterator[Path]:
    arguments = ["--state", f"{place}/state", "--data", f"unix:{place}/data", "--flags", "startup-clear", *options]
    with serving(place, *arguments) as process:
        yield place / "data"
        status, said = end(process)
        assert status == 0
        # Debian's swtpm ends without TPM2_Shutdown, which is worth a word, and no other is said.
        assert all("was not shut down" in line for line in said.splitlines()), said


def swtpm_refuses(place: Path, layout: str, key: tuple[str, ...]) -> bool:
    command = swtpm_command(place, layout, key)
    return subprocess.run(command, check=False, capture_output=True, timeout=PATIENCE).returncode != 0


def write(data: Path, value: bytes) -> None:
    assert c.code(ask(data, c.nv_write(value), 19)) == c.SUCCESS


def read(data: Path) -> bytes:
    return c.nv_value(ask(data, c.nv_read(8), 29))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", [None, *FORMS])
def test_turns(directory: Path, layout: str, form: str | None) -> None:
    if layout == "swtpm":
        (directory / "state").mkdir()
    theirs = option(directory, "--key", form)
    own = ["--swtpm-key", theirs[1]] if theirs else []
    with swtpm(directory, layout, theirs) as data:
        assert c.code(ask(data, c.nv_define(8), 19)) == c.SUCCESS
        write(data, b"swtpm 1.")
    with ours(directory, *own) as data:
        assert read(data) == b"swtpm 1."
        write(data, b"crbd 1..")
    with swtpm(directory, layout, theirs) as data:
        assert read(data) == b"crbd 1.."
        write(data, b"swtpm 2.")
    with ours(directory, *own) as data:
        assert read(data) == b"swtpm 2."


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tpm_that_was_made_by_us(directory: Path, layout: str) -> None:
    theirs = option(directory, "--key", "pbkdf2 256")
    with ours(directory, "--create", "--layout", layout, "--swtpm-key", theirs[1]) as data:
        assert c.code(ask(data, c.nv_define(8), 19)) == c.SUCCESS
        write(data, b"by crbd.")
    assert swtpm_refuses(directory, layout, ())
    with swtpm(directory, layout, theirs) as data:
        assert read(data) == b"by crbd."


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("written", "given", "status"),
    [("hex 256", None, 14), ("hex 256", "pbkdf2 256", 40), ("hex 256", "hex", 40), (None, "hex 256", 43)],
)
def test_both_refuse_the_same_keys(
    directory: Path, layout: str, written: str | None, given: str | None, status: int
) -> None:
    """Among them a key where the state is plain: swtpm, too, takes that for a mistake."""
    if layout == "swtpm":
        (directory / "state").mkdir()
    with swtpm(directory, layout, option(directory, "--key", written)):
        pass
    wrong = option(directory, "--key", given)
    assert swtpm_refuses(directory, layout, wrong)
    arguments = ["--swtpm-key", wrong[1]] if wrong else []
    done = crbd("serve", "--state", directory / "state", "--data", f"unix:{directory}/data", *arguments)
    assert done.returncode == status, done


@pytest.mark.parametrize("layout", LAYOUTS)
def test_registers_beside_swtpms_state(directory: Path, layout: str) -> None:
    """Beside volatile state; swtpm goes on from that, and afterwards the registers are not those of the TPM."""
    theirs = option(directory, "--key", "hex 256")
    with ours(directory, "--create", "--layout", layout, "--swtpm-key", theirs[1], "--ctrl", f"unix:{directory}/ctrl"):
        assert ask(directory / "ctrl", (10).to_bytes(4, "big"), 4) == bytes(4), "STORE_VOLATILE"
    side = SideState(None, Session(0, 4096, False, 0))
    store = open_state(directory / "state", create=False, swtpm_key=key_of("hex 256"))
    volatile = store.load(StateKind.VOLATILE)
    assert volatile is not None
    store.commit({}, side)
    assert store.load_side() == side
    store.close()
    with swtpm(directory, layout, theirs):
        assert ask(directory / "ctrl", (10).to_bytes(4, "big"), 4) == bytes(4)
    store = open_state(directory / "state", create=False, swtpm_key=key_of("hex 256"))
    assert store.load(StateKind.VOLATILE) not in (None, volatile)
    assert store.load_side() is None
    store.close()
