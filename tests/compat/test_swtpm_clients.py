"""Programs that start a `swtpm` themselves, with ours in its place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .swtpm_processes import CHECKOUT, GET_RANDOM, LAUNCHERS, connected, end, run_command, running, swtpm

pytestmark = pytest.mark.e2e

CACHE = Path(os.environ.get("CRBD_CACHE", CHECKOUT / ".cache"))
NEWER = CACHE / "libtpms-newer"


@pytest.mark.skipif(shutil.which("swtpm_setup") is None, reason="needs Debian's swtpm-tools")
@pytest.mark.parametrize("encrypted", [False, True])
def test_debians_swtpm_setup(tmp_path: Path, encrypted: bool) -> None:
    """It starts our daemon on socket pairs, waits for the pid in a file of its own making, and ends it."""
    state, log = tmp_path / "state", tmp_path / "log"
    state.mkdir()
    (tmp_path / "passphrase").write_text("a passphrase")
    key = ("--pwdfile", tmp_path / "passphrase", "--cipher", "aes-256-cbc") if encrypted else ()
    done = subprocess.run(
        [
            *("swtpm_setup", "--tpm2", "--tpm-state", state, "--tpm", f"{LAUNCHERS / 'swtpm'} socket"),
            *("--createek", "--lock-nvram", "--pcr-banks", "sha256,sha384", "--logfile", log, *key),
        ],
        check=False,
        timeout=60,
        env=os.environ | {"CRBD_PYTHON": sys.executable},
    )
    assert done.returncode == 0, log.read_text()
    assert "Successfully authored TPM state." in log.read_text()
    data = tmp_path / "data"
    arguments = ("--server", f"type=unixio,path={data}", "--flags", "startup-clear")
    key_option = ("--key", f"pwdfile={tmp_path / 'passphrase'},mode=aes-256-cbc") if encrypted else ()
    with running(tmp_path, *arguments, *key_option) as process:
        with connected(data) as client:
            assert run_command(client, GET_RANDOM)[6:10] == bytes(4)
        assert end(process) == 0


@pytest.fixture
def with_profiles(tmp_path: Path) -> list[str]:
    """Our swtpm on a libtpms that has profiles."""
    if not (NEWER / "crbd-stamp").exists():
        pytest.skip("NO NEWER LIBTPMS, so profiles were not tried: run scripts/libtpms-newer once")
    return [str(NEWER / "run"), sys.executable, "-m", "crbd.compat.launch", "swtpm", "socket", "--tpm2"]


def _print(command: list[str], *arguments: str) -> str:
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_profiles(with_profiles: list[str], tmp_path: Path) -> None:
    capabilities = json.loads(_print(with_profiles, "--print-capabilities"))
    if "cmdarg-profile" not in capabilities["features"]:
        pytest.skip("the system's libtpms was loaded, which has no profiles")
    assert {"names", "algorithms", "commands"} == capabilities["profiles"].keys()
    available = json.loads(_print(with_profiles, "--print-profiles"))["AvailableProfiles"]
    assert {profile["Name"] for profile in available} == set(capabilities["profiles"]["names"])
    for name in ("null", "custom"):
        state = tmp_path / name
        state.mkdir()
        where = ("--tpmstate", f"dir={state}")
        found = json.loads(_print(with_profiles, *where, "--profile", f"name={name}", "--print-info", "0x20"))
        assert found["ActiveProfile"]["Name"] == name
        again = json.loads(_print(with_profiles, *where, "--print-info", "0x20"))
        assert again == found


def test_profiles_are_refused_where_there_are_none(tmp_path: Path) -> None:
    able = "cmdarg-profile" in swtpm("socket", "--tpm2", "--print-capabilities").stdout
    ended = swtpm("socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--profile", "name=null", "--print-info", "32")
    assert (ended.returncode == 0) is able
    if not able:
        assert ended.stderr.startswith("swtpm: --profile: ")
        assert not (tmp_path / "tpm2-00.permall").exists()
