"""A run that does not come to its end leaves what was there before, and the next one finishes."""

from __future__ import annotations

import signal
import stat
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from crbd.compat.setup_work import _Overwritten
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import StateWriteError
from crbd.provision.options import Existing, KeyAlgorithm
from crbd.provision.provisioning import provision
from crbd.provision.report import Outcome
from crbd.provision.signing import DevIdRequest, EkRequest
from crbd.provision.staging import MARK
from crbd.state.kinds import StateKind
from crbd.state.side import SideState
from crbd.store.document import FILE_NAME
from crbd.store.layout import Layout, open_state
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from tests.cli.process import crbd
from tests.cli.states import contents
from tests.service.failing_store import FailingStore

from .tpms import CERTIFIED, P256, DeviceSigner, Signer, looked_at, make, plain_tpm

EVERYTHING = replace(
    CERTIFIED,
    storage_key=KeyAlgorithm.ECC_P256,
    attestation_key=KeyAlgorithm.ECC_P256,
    device_identity_key=KeyAlgorithm.ECC_P256,
    allow_signing=True,
    lock_nvram=True,
)


class StoppedError(Exception):
    """The end of a run, in the middle."""


class StoppingEngine(LibtpmsEngine):
    """libtpms until `left` commands were executed; then the run ends."""

    left = 0

    def execute(self, command: bytes | bytearray | memoryview) -> bytes:
        if not StoppingEngine.left:
            raise StoppedError
        StoppingEngine.left -= 1
        return super().execute(command)


def stopped_at_every_command(run: Callable[[], object], check: Callable[[], None]) -> int:
    """Run and stop after 0, 1, 2, … commands, checking what was left, until a run comes to its end.

    Returns how many commands that took.
    """
    for commands in range(1000):
        StoppingEngine.left = commands
        try:
            run()
        except StoppedError:
            check()
        else:
            return commands - StoppingEngine.left
    raise AssertionError("no end")


@pytest.mark.parametrize("layout", [Layout.CRBD, Layout.SWTPM])
def test_stopped_at_every_command_there_is_no_new_tpm(layout: Layout, tmp_path: Path) -> None:
    def run() -> None:
        store = open_state(tmp_path, create=True, layout=layout)
        try:
            report = provision(store, EVERYTHING, DeviceSigner(), StoppingEngine, directory=tmp_path)
            assert report.outcome is Outcome.MADE
        finally:
            store.close()

    def check() -> None:
        assert contents(tmp_path) == {}

    assert stopped_at_every_command(run, check) > 30
    store = open_state(tmp_path, create=False)
    with looked_at(store) as tpm:
        assert len(tpm.persistent_handles()) == 4
        assert len(tpm.nv_indices()) == 5


@pytest.mark.parametrize("existing", [Existing.COMPLETE, Existing.REPLACE])
def test_stopped_at_every_command_a_tpm_stays_as_it_was(existing: Existing) -> None:
    store = plain_tpm()
    before = store.load(StateKind.PERMANENT)

    def run() -> None:
        provision(store, replace(EVERYTHING, existing=existing), DeviceSigner(), StoppingEngine)

    def check() -> None:
        assert store.load(StateKind.PERMANENT) == before

    assert stopped_at_every_command(run, check) > 30
    assert store.load(StateKind.PERMANENT) != before


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_signer_that_fails_leaves_nothing(call: int) -> None:
    class Failing(Signer):
        def _issue(self, kind: str, request: EkRequest | DevIdRequest) -> bytes:
            if len(self.requests) + 1 == call:
                raise StoppedError
            return super()._issue(kind, request)

    store = MemoryStore()
    with pytest.raises(StoppedError):
        make(replace(CERTIFIED, endorsement_keys=(KeyAlgorithm.ECC_P256, KeyAlgorithm.ECC_P384)), store, Failing())
    assert store.load(StateKind.PERMANENT) is None


def test_a_full_disk_leaves_the_tpm_that_was_there() -> None:
    store = FailingStore()
    make(P256, store)
    before = store.load(StateKind.PERMANENT)
    store.full = True
    with pytest.raises(StateWriteError, match="no space left"):
        make(replace(P256, existing=Existing.REPLACE), store)
    assert store.load(StateKind.PERMANENT) == before


class EndingStore(MemoryStore):
    """Takes `left` commits; with the next one the run ends."""

    left = 1000
    commits = 0

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        if self.commits == self.left:
            raise StoppedError
        self.commits += 1
        super().commit(changes, side)


@pytest.mark.parametrize("left", [0, 1])
def test_ended_at_every_commit_volatile_state_lies_beside_the_tpm_that_it_belongs_to(left: int) -> None:
    store = EndingStore()
    make(P256, store)
    before = store.load(StateKind.PERMANENT)
    store.commit({StateKind.VOLATILE: b"suspended"})
    store.commits, store.left = 0, left
    replacing = replace(P256, existing=Existing.REPLACE)
    if left < 1:
        with pytest.raises(StoppedError):
            make(replacing, store)
    else:
        make(replacing, store)
    state = (store.load(StateKind.PERMANENT) == before, store.load(StateKind.VOLATILE))
    assert state == ((True, b"suspended"), (False, None))[left]


@pytest.mark.parametrize("left", [0, 1])
def test_so_does_one_that_is_overwritten_unread(left: int) -> None:
    store = EndingStore({StateKind.PERMANENT: b"not to be read", StateKind.VOLATILE: b"suspended"})
    store.left = left
    overwritten = _Overwritten(store)
    assert overwritten.load(StateKind.PERMANENT) is None
    if left < 1:
        with pytest.raises(StoppedError):
            overwritten.commit({StateKind.PERMANENT: b"new"})
        assert overwritten.load(StateKind.PERMANENT) is None
    else:
        overwritten.commit({StateKind.PERMANENT: b"new"})
    state = (store.load(StateKind.PERMANENT), store.load(StateKind.VOLATILE))
    assert state == ((b"not to be read", b"suspended"), (b"new", None))[left]


# -- processes


def killer(place: Path, calls: int) -> Path:
    """A signer's program that signs nothing, and at the given call kills the process that called it."""
    program = place / "killer"
    program.write_text(
        f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys
request = sys.stdin.buffer.read()
called = pathlib.Path({str(place / "called")!r})
with called.open("a") as file:
    file.write("x")
if len(called.read_text()) == {calls}:
    os.kill(os.getppid(), signal.SIGKILL)
    sys.exit(1)
import json
from cryptography.hazmat.primitives.serialization import load_pem_public_key
sys.path.insert(0, {str(Path(__file__).resolve().parents[2])!r})
from tests.provision.tpms import certificate
sys.stdout.buffer.write(certificate(load_pem_public_key(json.loads(request)["public_key"].encode()), "x"))
"""
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.mark.parametrize(("layout", "calls"), [("crbd", 2), ("swtpm", 1)])
def test_killed(layout: str, calls: int, tmp_path: Path) -> None:
    state = tmp_path / "state"
    wanted = ["provision", "--state", str(state), "--layout", layout, "--ek", "ecc_nist_p256"]
    done = crbd(*wanted, "--signer", f"exec:{killer(tmp_path, calls)}")
    assert done.returncode == -signal.SIGKILL, done
    left = {MARK} if layout == "swtpm" else {MARK, f".{FILE_NAME}.new"}
    assert contents(state).keys() == left
    refused = crbd("ek", "show", state)
    assert refused.returncode == (11 if layout == "swtpm" else 18), refused
    done = crbd(*wanted, "--ca-dir", tmp_path / "ca")
    assert done.returncode == 0, done
    assert "an earlier run was interrupted before it had stored anything; it was started over" in done.stdout
    assert MARK not in contents(state)


def test_an_interrupted_run_may_have_left_a_whole_tpm(tmp_path: Path) -> None:
    store: Store = open_state(tmp_path, create=True)
    options = replace(P256, existing=Existing.KEEP)
    assert provision(store, options, None, LibtpmsEngine, directory=tmp_path).notes == ()
    (tmp_path / MARK).touch()
    report = provision(store, options, None, LibtpmsEngine, directory=tmp_path)
    assert "it left a whole TPM" in report.notes[0]
    assert not (tmp_path / MARK).exists()
    store.close()


def test_ended_by_an_error_is_not_interrupted(tmp_path: Path) -> None:
    store: Store = open_state(tmp_path, create=True)
    with pytest.raises(StoppedError):
        provision(store, CERTIFIED, _Stopping(), LibtpmsEngine, directory=tmp_path)
    assert provision(store, P256, None, LibtpmsEngine, directory=tmp_path).notes == ()
    store.close()


class _Stopping(Signer):
    def _issue(self, kind: str, request: EkRequest | DevIdRequest) -> bytes:
        raise StoppedError
