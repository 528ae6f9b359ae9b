"""tpm2-tools against the daemon's sockets (libtss2-tcti-swtpm), without a virtual machine."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .battery import NOTHING_LEFT, TRIALS, Trial
from .daemon import TpmDaemon, fresh_directory, tpm_daemon

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def daemon() -> Iterator[TpmDaemon]:
    """One TPM, powered on, for the whole battery."""
    with fresh_directory() as place, tpm_daemon(place, tools=True) as running:
        yield running


def _shell(script: str, daemon: TpmDaemon, directory: Path) -> str:
    """What a script says that must succeed."""
    done = subprocess.run(
        ["sh", "-c", script],
        check=False,
        env=os.environ | {"TPM2TOOLS_TCTI": f"swtpm:path={daemon.data}", "TMPDIR": str(directory)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=60,
    )
    status = done.returncode
    assert status == 0, f"status {status}:\n{done.stdout}\ndaemon:\n{daemon.said()}"
    return done.stdout


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_tpm2_tools(trial: Trial, daemon: TpmDaemon, tmp_path: Path) -> None:
    trial.check(_shell(trial.script, daemon, tmp_path))
    assert _shell(NOTHING_LEFT, daemon, tmp_path) == ""
