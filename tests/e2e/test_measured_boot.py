"""Measured boot: what the firmware wrote into its log is what the TPM's PCRs hold, in every bank."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from .daemon import fresh_directory, tpm_daemon
from .eventlog import Banks, parse, parse_pcrread, replay
from .qemu import Firmware, GuestImage, TpmDevice, guest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

_IMA_PCR = 10
"""The kernel's integrity measurements extend it, and log that elsewhere."""
_LOG = "/sys/kernel/security/tpm0/binary_bios_measurements"
_IMA_LOG = "/sys/kernel/security/ima/ascii_runtime_measurements"
_BANKS = {"sha1", "sha256", "sha384", "sha512"}


@dataclass(frozen=True, slots=True)
class Measured:
    """What a freshly booted guest says: the log as the kernel hands it out, the PCRs, the kernel's IMA log."""

    log: bytes
    pcrs: Banks
    ima: str


@pytest.fixture(
    scope="module",
    params=[(Firmware.OVMF, TpmDevice.CRB), (Firmware.OVMF, TpmDevice.TIS), (Firmware.SEABIOS, TpmDevice.CRB)],
    ids=lambda pair: f"{pair[0].value}-{pair[1].value}",
)
def measured(request: pytest.FixtureRequest, image: GuestImage) -> Measured:
    """One boot with each firmware and device."""
    firmware, device = request.param
    with (
        fresh_directory() as place,
        tpm_daemon(place) as daemon,
        guest(image, place, daemon.control, device, firmware) as running,
    ):
        log = base64.b64decode(running.read(f"base64 {_LOG}"))
        pcrs = parse_pcrread(running.read("tpm2_pcrread"))
        return Measured(log, pcrs, running.read(f"cat {_IMA_LOG}"))


def _start_value(pcr: int, size: int) -> bytes:
    """What a PCR holds that nothing was extended into (PC Client Platform TPM Profile: 17 to 22 start as all ones)."""
    return (b"\xff" if 17 <= pcr <= 22 else b"\0") * size


def test_log_replays_to_the_pcrs_in_every_bank(measured: Measured) -> None:
    replayed = replay(parse(measured.log))
    assert set(measured.pcrs) == set(replayed) == _BANKS
    for bank, values in measured.pcrs.items():
        assert set(values) == set(range(24))
        for pcr, value in values.items():
            if pcr != _IMA_PCR:
                assert value == replayed[bank].get(pcr, _start_value(pcr, len(value))), f"{bank} PCR {pcr}"


def test_firmware_measured_something(measured: Measured) -> None:
    for bank in measured.pcrs.values():
        assert all(any(bank[pcr]) for pcr in range(8)), "a PCR of the firmware was never extended"


def test_tpm2_eventlog_calculates_the_same(measured: Measured, tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_bytes(measured.log)
    done = subprocess.run(["tpm2_eventlog", str(file)], check=True, capture_output=True, text=True)
    assert parse_pcrread(done.stdout.partition("\npcrs:")[2]) == replay(parse(measured.log))


def test_kernel_read_the_same_pcrs_at_boot(measured: Measured) -> None:
    """IMA's first entry is the hash over PCRs 0 to 9, which the driver read before there was a user space."""
    recorded = re.search(r"^10 \S+ \S+ sha256:([0-9a-f]{64}) boot_aggregate", measured.ima)
    assert recorded, measured.ima
    aggregate = hashlib.sha256(b"".join(measured.pcrs["sha256"][pcr] for pcr in range(10)))
    assert recorded[1] == aggregate.hexdigest()
