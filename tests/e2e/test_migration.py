"""QEMU moves a guest with its TPM: live, into a file and back, to a snapshot and back, and in vain.

Each with a directory of state for either side, and on one directory whose lock is handed over.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from .daemon import DaemonKind, fresh_directory
from .moving import Chain, Place, Side, await_migration, enable, move, run_job, throttle
from .qemu import Guest, GuestImage, TpmDevice
from .waiting import DeadlineError

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

_RAW = "export TPM2TOOLS_TCTI=device:/dev/tpm0\n"
_PREPARE = """
tpm2_createprimary -Q -C o -G ecc -c /tmp/p.ctx
tpm2_startauthsession -S /tmp/s.ctx --policy-session
tpm2_nvdefine -Q -C o -s 9 -a 'ownerread|ownerwrite' 0x1500042
printf 'old value' >/tmp/in; tpm2_nvwrite -Q -C o -i /tmp/in 0x1500042
"""
_KEPT = """
tpm2_getcap handles-transient
tpm2_getcap handles-loaded-session
tpm2_nvread -C o 0x1500042
"""
_USE_SESSION = "tpm2_policycommandcode -Q -S /tmp/s.ctx TPM2_CC_Unseal\n"
_SLOW = 4 << 20
"""Bytes a second: the guest's memory takes tens of seconds then."""


def _run(guest: Guest, lines: str) -> str:
    return guest.read(f"{_RAW}set -eu\n{lines}")


def _prepare(side: Side) -> str:
    """Have something of every kind in the TPM; what it says of itself."""
    _run(side.guest, _PREPARE)
    kept = _run(side.guest, _KEPT)
    assert "0x80000000" in kept
    assert kept.endswith("old value")
    return kept


def _check(side: Side, kept: str) -> None:
    """All of it is there, and of use."""
    assert _run(side.guest, _KEPT) == kept
    _run(side.guest, _USE_SESSION)


@pytest.fixture
def bare(image: GuestImage) -> Iterator[Place]:
    """With a directory of state for each side."""
    with fresh_directory() as root:
        yield Place(root, image)


@pytest.fixture(params=[False, True], ids=["two directories", "one directory"])
def place(request: pytest.FixtureRequest, bare: Place) -> Place:
    """With a directory of state for each side, and with a common one."""
    return replace(bare, shared=bool(request.param))


@pytest.mark.parametrize(
    ("device", "shared"),
    [(TpmDevice.CRB, True), (TpmDevice.CRB, False), (TpmDevice.TIS, True)],
    ids=["crb, one directory", "crb, two directories", "tis, one directory"],
)
def test_live_with_commands_all_the_time(device: TpmDevice, shared: bool, bare: Place) -> None:
    """And the source is killed as soon as QEMU says that the guest has moved."""
    place = replace(bare, device=device, shared=shared, common_memory=True)
    with place.side("a") as source, place.side("b", incoming=True) as destination:
        kept = _prepare(source)
        chain = Chain(source)
        chain.reach(source)
        move(source, destination, place.root)
        source.kill()
        chain.reach(destination)
        chain.finish(destination)
        _check(destination, kept)
        # The TPM that arrived is one that can be reset and shut down.
        destination.guest.reset()
        assert _run(destination.guest, "tpm2_nvread -C o -s 9 0x1500042") == "old value"
        destination.guest.power_off()
        assert destination.daemon.wait_ended() == 0


def test_into_a_file_and_back(place: Place) -> None:
    """The guest is halted and its source ends in good order; it goes on from the file with another daemon."""
    with place.side("a") as source:
        kept = _prepare(source)
        chain = Chain(source)
        chain.reach(source)
        source.monitor.execute("stop")
        source.monitor.execute("migrate", {"uri": f"exec:cat >{place.root}/saved"})
        await_migration(source, "completed")
        source.monitor.execute("quit")
        source.guest.wait_ended()
        assert source.daemon.wait_ended() == 0
    with place.side("b", incoming=True) as destination:
        destination.monitor.execute("migrate-incoming", {"uri": f"exec:cat {place.root}/saved"})
        await_migration(destination, "completed")
        destination.monitor.execute("cont")
        chain.reach(destination)
        chain.finish(destination)
        _check(destination, kept)


def test_there_and_back_again(place: Place) -> None:
    """A second move, to a new daemon on the first one's state."""
    place = replace(place, common_memory=True)
    with place.side("b", incoming=True) as there:
        with place.side("a") as source:
            chain = Chain(source)
            chain.reach(source)
            move(source, there, place.root)
            source.monitor.execute("quit")
            assert source.daemon.wait_ended() == 0
        chain.reach(there)
        with place.side("a", incoming=True) as back:
            move(there, back, place.root)
            there.kill()
            chain.reach(back)
            chain.finish(back)


def test_cancelled(place: Place) -> None:
    """While memory is copied, and again when the guest was halted and QEMU was about to fetch the TPM's state."""
    with place.side("a") as source, place.side("b", incoming=True) as destination:
        kept = _prepare(source)
        chain = Chain(source)
        uri = f"unix:{place.root}/migration"
        destination.monitor.execute("migrate-incoming", {"uri": uri})
        throttle(source, _SLOW)
        source.monitor.execute("migrate", {"uri": uri})
        await_migration(source, "active")
        chain.reach(source, 1)
        source.monitor.execute("migrate_cancel")
        await_migration(source, "cancelled")
        destination.kill()
        chain.reach(source)

        throttle(source, 1 << 30)
        enable(source, "pause-before-switchover")
        source.monitor.execute("migrate", {"uri": "exec:cat >/dev/null"})
        await_migration(source, "pre-switchover")
        source.monitor.execute("migrate_cancel")
        try:
            await_migration(source, "cancelled")
        except DeadlineError:
            # Now and then QEMU 7.2 never comes out of this, guest and monitor; the TPM has not been asked for by then.
            pytest.skip("QEMU hangs in its own cancellation")
        chain.reach(source)
        chain.finish(source)
        _check(source, kept)


def test_destination_killed_half_way(place: Place) -> None:
    with place.side("a") as source, place.side("b", incoming=True) as destination:
        kept = _prepare(source)
        chain = Chain(source)
        uri = f"unix:{place.root}/migration"
        destination.monitor.execute("migrate-incoming", {"uri": uri})
        throttle(source, _SLOW)
        source.monitor.execute("migrate", {"uri": uri})
        await_migration(source, "active")
        chain.reach(source, 1)
        destination.kill()
        await_migration(source, "failed")
        chain.reach(source)
        chain.finish(source)
        _check(source, kept)


def test_snapshot(place: Place) -> None:
    """savevm and loadvm: the guest goes on after the one, and again from there after the other."""
    disk = place.root / "snapshots.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "64M"], check=True)
    block = f"driver=qcow2,node-name=disk,file.driver=file,file.filename={disk}"
    where: dict[str, object] = {"tag": "one", "vmstate": "disk", "devices": ["disk"]}
    with place.side("a", machine=("-blockdev", block)) as side:
        kept = _prepare(side)
        chain = Chain(side)
        before = chain.reach(side)
        run_job(side, "snapshot-save", where)
        after = chain.reach(side, 20)
        _run(side.guest, "printf 'new value' >/tmp/in; tpm2_nvwrite -Q -C o -i /tmp/in 0x1500042")
        run_job(side, "snapshot-load", where)
        again = chain.reach(side, 1)
        assert before <= again < after, "it went back"
        chain.finish(side)
        _check(side, kept)


def test_destination_that_refuses_the_state(place: Place) -> None:
    """The state was fetched and the lock given up when the destination fails; whoever manages the guest continues it
    at the source, as libvirt does."""
    (place.root / "key").write_text("a passphrase")
    key = ("--migration-key", f"pwdfile={place.root}/key,mode=aes-256-cbc")
    with place.side("a", options=key) as source, place.side("b", incoming=True) as destination:
        kept = _prepare(source)
        chain = Chain(source)
        chain.reach(source)
        uri = f"unix:{place.root}/migration"
        destination.monitor.execute("migrate-incoming", {"uri": uri})
        source.monitor.execute("migrate", {"uri": uri})
        await_migration(source, "completed")
        assert destination.guest.wait_ended() == 1
        assert "--migration-key" in destination.daemon.said()
        source.monitor.execute("cont")
        chain.reach(source)
        chain.finish(source)
        _check(source, kept)
        assert not (place.root / "b" / "state" / "tpm.crbd").exists(), "nothing was made where nothing arrived"


def test_source_that_goes_on_although_the_guest_has_moved(bare: Place) -> None:
    """On one directory: its TPM answers with failure as long as the destination runs."""
    place = replace(bare, shared=True)
    with place.side("a") as source, place.side("b", incoming=True) as destination:
        chain = Chain(source)
        chain.reach(source)
        source.monitor.execute("stop")
        move(source, destination, place.root)
        destination.monitor.execute("cont")
        chain.reach(destination)
        source.monitor.execute("cont")
        failed = source.guest.run(f"{_RAW}tpm2_getrandom 4", seconds=60)
        assert failed.status != 0, failed.text
        assert "in use by" in source.daemon.said()
        source.kill()
        chain.reach(destination)
        chain.finish(destination)


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "migration key"])
def test_from_swtpm_to_crbd_and_back(keyed: bool, bare: Place) -> None:
    """Live both ways, with one guest."""
    place = replace(bare, common_memory=True)
    root = place.root
    (root / "key").write_text("a passphrase")
    options = ("--migration-key", f"pwdfile={root}/key,mode=aes-256-cbc") if keyed else ()
    with place.side("b", incoming=True, options=options) as ours:
        with place.side("a", kind=DaemonKind.SWTPM, options=options) as theirs:
            kept = _prepare(theirs)
            chain = Chain(theirs)
            chain.reach(theirs)
            move(theirs, ours, root)
            theirs.kill()
        chain.reach(ours)
        _check(ours, kept)
        with place.side("c", incoming=True, kind=DaemonKind.SWTPM, options=options) as theirs:
            move(ours, theirs, root)
            ours.kill()
            chain.reach(theirs)
            chain.finish(theirs)
            _check(theirs, kept)
