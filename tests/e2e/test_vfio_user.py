"""A TPM that is a PCI device of QEMU 11: unmodified kernels, on x86 with SeaBIOS and OVMF, on aarch64 with AAVMF."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator

import pytest

from .battery import PRELUDE, TRIALS, Trial
from .daemon import CRBD, TpmDaemon, fresh_directory
from .moving import Chain, Side
from .qemu import Guest, GuestImage
from .vfio_bed import BEHIND_PORT, ON_ROOT_BUS, ArmImage, Bed, Machine, Place, Qemu11, served_daemon

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

_RAW = "export TPM2TOOLS_TCTI=device:/dev/tpm0\n"
_PCR = "cat /sys/class/tpm/tpm0/pcr-sha256/12"
_BEDS = (Bed.SEABIOS, Bed.OVMF, Bed.AAVMF)
UPGRADES = 20


@pytest.fixture(scope="module")
def machine(image: GuestImage) -> Machine:
    """What guests are made with."""
    qemu = Qemu11.find()
    if qemu is None:
        pytest.skip("no QEMU 11 for x86 and aarch64 here; root makes one with scripts/qemu11-chroot")
    return Machine(qemu, image, ArmImage.make())


@pytest.fixture(scope="module", params=_BEDS, ids=lambda bed: bed.value)
def bed(request: pytest.FixtureRequest) -> Bed:
    """What the guest boots with."""
    chosen = request.param
    assert isinstance(chosen, Bed)
    return chosen


@pytest.fixture(scope="module")
def booted(bed: Bed, machine: Machine) -> Iterator[Side]:
    """A guest and its daemon that serve all tests with that bed."""
    with fresh_directory() as place, served_daemon(place) as daemon, machine.guest(bed, place) as running:
        yield Side(daemon, running)


def _run(running: Guest, lines: str) -> str:
    return running.read(f"{_RAW}{PRELUDE}{lines}", seconds=120)


def test_driver_is_bound(booted: Side) -> None:
    assert booted.guest.read("basename $(readlink /sys/class/tpm/tpm0/device/driver)") == "tpm_crb"
    assert booted.guest.read("cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
    said = booted.guest.read("dmesg -r | grep -iE 'tpm|acpi' | grep -E '^<[0-4]>' || :")
    # No firmware looks for a TPM here, so the kernel is the one who sends TPM2_Startup.
    complaints = [line for line in said.splitlines() if not re.search("A TPM error .256. occurred attempting", line)]
    assert [line for line in complaints if re.search("tpm|MSFT0101|CRBD|S80|AE_", line)] == []


def test_registers_are_in_the_bar(booted: Side) -> None:
    """The kernel took the addresses for those of the PCI device, and the TPM2 table says the same."""
    lines = booted.guest.read("grep -A1 ': 0000:00:10.0' /proc/iomem").splitlines()
    (bar, start), (tpm, again) = ((line.split(" : ")[1], line.split(" : ")[0].strip()) for line in lines)
    assert (bar, tpm) == ("0000:00:10.0", "MSFT0101:00")
    assert start == again
    table = bytes.fromhex(booted.guest.read("od -An -v -tx1 /sys/firmware/acpi/tables/TPM2"))
    assert int.from_bytes(table[40:48], "little") == int(start.split("-")[0], 16) + 0x40
    assert sum(table) & 0xFF == 0


def test_registers_can_be_shown(booted: Side) -> None:
    booted.guest.read(f"{_RAW} tpm2_getrandom --hex 8")
    shown = subprocess.run(
        [*CRBD, "registers", "--ctrl", f"unix:{booted.daemon.control}"], check=True, capture_output=True, text=True
    )
    assert "CTRL_START" in shown.stdout


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_tpm2_tools(trial: Trial, booted: Side, bed: Bed) -> None:
    if bed is not Bed.SEABIOS and TRIALS.index(trial) % 4 and os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
        pytest.skip("one in four where it is slow; all of them at night")
    trial.check(booted.guest.read(_RAW + trial.script, seconds=120))


def test_reboot_resets_pcrs_and_keeps_nv(booted: Side) -> None:
    running = booted.guest
    _run(running, "tpm nvdefine -Q -C o -s 9 -a 'ownerread|ownerwrite' 0x1500043")
    _run(running, "printf 'old value' >in; tpm nvwrite -Q -C o -i in 0x1500043")
    for _ in range(2):
        assert running.read(_PCR) == "00" * 32
        _run(running, f"tpm2_pcrextend 12:sha256={'5a' * 32}")
        assert running.read(_PCR) != "00" * 32
        running.reset()
    assert running.read(_PCR) == "00" * 32
    assert _run(running, "tpm nvread -C o 0x1500043").endswith("old value")


def _reload(daemon: TpmDaemon) -> None:
    subprocess.run([*CRBD, "reload", "--ctrl", f"unix:{daemon.control}"], check=True, capture_output=True)


def test_upgrades_while_the_guest_extends_a_pcr(booted: Side) -> None:
    """Every extend took place, once; then the guest boots with what is there now."""
    chain = Chain(booted)
    chain.reach(booted)
    for _ in range(UPGRADES):
        _reload(booted.daemon)
    chain.reach(booted)
    chain.finish(booted)
    booted.guest.reset()
    assert booted.guest.read(_PCR) == "00" * 32


def test_power_off_and_the_next_guest(bed: Bed, machine: Machine) -> None:
    """The daemon outlives its VMM: the next one finds the same TPM, reset."""
    with fresh_directory() as place, served_daemon(place) as daemon:
        with machine.guest(bed, place) as running:
            _run(running, "tpm nvdefine -Q -C o -s 9 -a 'ownerread|ownerwrite' 0x1500043")
            _run(running, f"tpm2_pcrextend 12:sha256={'5a' * 32}")
            running.power_off()
        assert daemon.process.poll() is None
        with machine.guest(bed, place) as running:
            assert running.read(_PCR) == "00" * 32
            assert "0x1500043" in _run(running, "tpm getcap handles-nv-index")


def test_server_killed(machine: Machine) -> None:
    """Guest and QEMU live on without the TPM, and say so; a new server does not give it back, a new QEMU does."""
    with fresh_directory() as place, served_daemon(place) as daemon, machine.guest(Bed.SEABIOS, place) as running:
        daemon.process.kill()
        daemon.process.wait()
        assert running.run(f"{_RAW} tpm2_getrandom --hex 8", seconds=120).status != 0
        with served_daemon(place, create=False):
            assert running.run(f"{_RAW} tpm2_getrandom --hex 8", seconds=120).status != 0
            assert running.read("echo alive") == "alive"
            assert running.monitor.execute("query-status")["running"]
            assert f"(vfio-user:{place}/tpm.regs:region0" in (place / "qemu.log").read_text()
            running.kill()
            with machine.guest(Bed.SEABIOS, place) as again:
                assert len(again.read(f"{_RAW} tpm2_getrandom --hex 8")) == 16


@pytest.mark.parametrize(
    ("bed", "place"),
    [
        (Bed.SEABIOS, BEHIND_PORT),
        (Bed.AAVMF, BEHIND_PORT),
        (Bed.AAVMF_CHAIN, ON_ROOT_BUS),
    ],
    ids=["x86-root-port", "aarch64-root-port", "aarch64-next-boot-loader"],
)
def test_other_places(bed: Bed, place: Place, machine: Machine) -> None:
    """Behind a root port, and with the guest on a disk of its own."""
    with fresh_directory() as directory, served_daemon(directory), machine.guest(bed, directory, place) as running:
        assert running.read("basename $(readlink /sys/class/tpm/tpm0/device/driver)") == "tpm_crb"
        _run(running, f"tpm2_pcrextend 12:sha256={'5a' * 32}")
        running.reset()
        assert running.read(_PCR) == "00" * 32
