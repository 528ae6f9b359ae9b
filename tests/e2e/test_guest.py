"""A Linux guest's driver and tpm2-tools on it: one boot with each of QEMU's TPM devices."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .battery import TRIALS, Trial
from .daemon import fresh_directory, tpm_daemon
from .eventlog import parse_pcrread
from .qemu import Guest, GuestImage, TpmDevice, guest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

_RAW = "export TPM2TOOLS_TCTI=device:/dev/tpm0\n"
_MANAGED = "export TPM2TOOLS_TCTI=device:/dev/tpmrm0\n"
_DRIVERS = {TpmDevice.CRB: "tpm_crb", TpmDevice.TIS: "tpm_tis"}


@pytest.fixture(scope="module", params=TpmDevice, ids=lambda device: device.value)
def device(request: pytest.FixtureRequest) -> TpmDevice:
    """Which TPM device the guest has."""
    chosen = request.param
    assert isinstance(chosen, TpmDevice)
    return chosen


@pytest.fixture(scope="module")
def booted(device: TpmDevice, image: GuestImage) -> Iterator[Guest]:
    """A guest that serves all tests with that device."""
    with (
        fresh_directory() as place,
        tpm_daemon(place) as daemon,
        guest(image, place, daemon.control, device) as running,
    ):
        yield running


def test_driver_is_bound(booted: Guest, device: TpmDevice) -> None:
    assert booted.read("basename $(readlink /sys/class/tpm/tpm0/device/driver)") == _DRIVERS[device]
    assert booted.read("cat /sys/class/tpm/tpm0/tpm_version_major") == "2"
    # The driver's own start-up (self test, timeouts, locality) said nothing against the TPM.
    complaints = booted.read("dmesg -r | grep -i tpm | grep -E '^<[0-4]>' || :")
    assert complaints == ""


def test_kernel_and_tools_read_the_same_pcrs(booted: Guest) -> None:
    kernel = booted.read("cd /sys/class/tpm/tpm0/pcr-sha256; for pcr in 0 4 7 10 17 23; do echo $pcr $(cat $pcr); done")
    tools = parse_pcrread(booted.read(f"{_RAW} tpm2_pcrread sha256"))["sha256"]
    rows = [line.split() for line in kernel.splitlines()]
    assert {int(pcr): bytes.fromhex(value) for pcr, value in rows} == {pcr: tools[pcr] for pcr in (0, 4, 7, 10, 17, 23)}


def test_resource_manager_leaves_nothing_loaded(booted: Guest) -> None:
    """The kernel's: six processes load a key each, more than the TPM has slots for, and none flushes it."""
    booted.read(f"{_RAW} tpm2_flushcontext -t")
    booted.read(f"{_MANAGED} for try in 1 2 3 4 5 6; do tpm2_createprimary -Q -C o -G ecc -c /tmp/p.ctx || exit; done")
    assert booted.read(f"{_RAW} tpm2_getcap handles-transient") == ""


@pytest.mark.parametrize("trial", TRIALS, ids=lambda trial: trial.name)
def test_tpm2_tools(trial: Trial, booted: Guest) -> None:
    trial.check(booted.read(_RAW + trial.script, seconds=90))
