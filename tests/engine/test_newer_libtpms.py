"""State goes from the system's libtpms to a newer one, and is refused on the way back (scripts/libtpms-newer)."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from crbd.engine.libtpms import LibtpmsEngine
from crbd.service.durable import DurableState
from crbd.store.memory import MemoryStore
from crbd.tpm import questions
from tests.cli.process import ask, crbd, end, serving
from tests.cli.states import contents

pytestmark = pytest.mark.e2e

UNPACKED = Path(os.environ.get("CRBD_CACHE", Path(__file__).resolve().parents[2] / ".cache")) / "libtpms-newer"
INDEX = 0x01C10000
EMPTY_AUTH = bytes.fromhex("00000009400000090000000000")
SUCCESS = "00000000"


@pytest.fixture(scope="module")
def newer() -> tuple[str, ...]:
    """What runs a program with the newer library's surroundings, and the option that names it."""
    if not (UNPACKED / "crbd-stamp").exists():
        pytest.skip("NO NEWER LIBTPMS, so state of 0.9 was not taken to 0.10: run scripts/libtpms-newer once")
    engine = LibtpmsEngine(DurableState(MemoryStore()))
    older, here = (
        engine.version,
        crbd("serve", "--ephemeral", "--ctrl", "fd:999", "--libtpms", library(), through=runner()),
    )
    engine.close()
    assert here.returncode == 30, here.stderr
    if (older.major, older.minor) >= (0, 10):
        pytest.skip(f"NO OLDER LIBTPMS: this system has {older}, and nothing here is older than that")
    return runner()


def runner() -> tuple[str, ...]:
    return (str(UNPACKED / "run"),)


def library() -> Path:
    return UNPACKED / "libtpms"


def command(tag: str, code: int, body: bytes) -> bytes:
    return bytes.fromhex(tag) + (10 + len(body)).to_bytes(4, "big") + code.to_bytes(4, "big") + body


def nv_write(data: bytes) -> bytes:
    handles = questions.RH_PLATFORM.to_bytes(4, "big") + INDEX.to_bytes(4, "big")
    return command("8002", 0x137, handles + EMPTY_AUTH + len(data).to_bytes(2, "big") + data + bytes(2))


def nv_read(size: int) -> bytes:
    handles = questions.RH_PLATFORM.to_bytes(4, "big") + INDEX.to_bytes(4, "big")
    return command("8002", 0x14E, handles + EMPTY_AUTH + size.to_bytes(2, "big") + bytes(2))


def extend(digest: bytes) -> bytes:
    return command("8002", 0x182, bytes(4) + EMPTY_AUTH + bytes.fromhex("00000001000b") + digest)


def pcr_read() -> bytes:
    return command("8001", 0x17E, bytes.fromhex("00000001000b03010000"))


def serve(state: Path, *arguments: str, through: tuple[str, ...] = ()) -> list[str]:
    options = ["--state", str(state), "--data", f"unix:{state.parent}/data", *arguments]
    return [*options, "--libtpms", str(library())] if through else options


def talk(place: Path, one: bytes, size: int) -> bytes:
    answer = ask(place / "data", one, size)
    assert answer[6:10].hex() == SUCCESS, answer.hex()
    return answer


def inspected(state: Path, through: tuple[str, ...] = ()) -> dict[str, Any]:
    options: list[str | Path] = ["--libtpms", library()] if through else []
    done = crbd("state", "inspect", state, "--json", *options, through=through)
    assert done.returncode == 0, done.stderr
    shown: dict[str, Any] = json.loads(done.stdout)
    return shown


def made_by_older(place: Path, *layout: str) -> Path:
    """A TPM with something in NV memory and in a PCR, suspended by the system's libtpms."""
    with serving(place, *serve(place / "tpm", "--create", "--flags", "startup-clear", *layout)) as process:
        talk(place, questions.define_space(INDEX, 8), 10)
        talk(place, nv_write(b"from 0.9"), 10)
        talk(place, extend(b"\x55" * 32), 10)
        assert end(process)[0] == 0
    return place / "tpm"


@pytest.mark.parametrize("layout", [(), ("--layout", "swtpm")], ids=["crbd", "swtpm"])
def test_a_tpm_of_the_older_one_goes_on_in_the_newer_one(
    tmp_path: Path, newer: tuple[str, ...], layout: tuple[str, ...]
) -> None:
    state = made_by_older(tmp_path, *layout)
    checked = crbd("check", state, "--libtpms", library(), through=newer)
    assert (checked.returncode, "libtpms 0.10" in checked.stdout) == (0, True), checked
    before = contents(state)
    arguments = serve(state, "--flags", "startup-state", through=newer)
    with serving(tmp_path, *arguments, through=newer) as process:
        assert talk(tmp_path, nv_read(8), 25)[16:24] == b"from 0.9"
        assert talk(tmp_path, pcr_read(), 62)[-32:] != bytes(32), "TPM2_Startup(STATE) brought the PCR back"
        talk(tmp_path, nv_write(b"now 0.10"), 10)
        assert end(process, signal.SIGTERM)[0] == 0
    assert contents(state) != before
    if not layout:
        engines = inspected(state, newer)["current"]["engines"]
        assert engines["permanent"]["version"].startswith("0.10.")


def test_the_way_back_is_refused_and_nothing_changes(tmp_path: Path, newer: tuple[str, ...]) -> None:
    state = made_by_older(tmp_path)
    with serving(tmp_path, *serve(state, "--flags", "startup-state", through=newer), through=newer) as process:
        talk(tmp_path, nv_write(b"now 0.10"), 10)
        assert end(process)[0] == 0
    before = contents(state)
    for arguments in (["check", state], ["serve", *serve(state)], ["state", "verify", state, "--engine"]):
        refused = crbd(*arguments)
        assert refused.returncode == 13, refused
        assert "was written by libtpms 0.10." in refused.stderr
        assert "install libtpms 0.10 or newer" in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert "was written by libtpms 0.10." in inspected(state)["tpm"]
    assert contents(state) == before
    assert crbd("check", state, "--libtpms", library(), through=newer).returncode == 0


@pytest.mark.parametrize(
    ("layout", "status", "words"),
    [("crbd", 13, "install libtpms 0.10 or newer"), ("swtpm", 12, "use the libtpms that wrote it")],
)
def test_a_tpm_with_a_profile_is_refused_in_either_layout(
    tmp_path: Path, newer: tuple[str, ...], layout: str, status: int, words: str
) -> None:
    """swtpm's files do not say what wrote them: there it is the older library that has to refuse, and does."""
    state = tmp_path / "tpm"
    options: list[str | Path] = [
        "--layout",
        layout,
        "--ek",
        "ecc_nist_p384",
        "--certificates",
        "none",
        "--libtpms",
        library(),
    ]
    made = crbd("provision", "--state", state, "--profile", '{"Name":"default-v1"}', *options, through=newer)
    assert made.returncode == 0, made.stderr
    if layout == "crbd":
        engine = inspected(state, newer)["current"]["engines"]["permanent"]
        assert engine["profile"] == "default-v1"
        assert engine["format_level"] > 1
    before = contents(state)
    for arguments in (["check", state], ["serve", *serve(state)]):
        refused = crbd(*arguments)
        assert refused.returncode == status, refused
        assert words in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert contents(state) == before
