"""What a guest's TPM keeps and what it forgets: over a reset, and over power-off with a new daemon."""

from __future__ import annotations

import re

import pytest

from .battery import PRELUDE
from .daemon import DaemonKind, fresh_directory, tpm_daemon
from .qemu import Guest, GuestImage, TpmDevice, guest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

_PREPARE = """
tpm createprimary -Q -C o -G ecc -c key.ctx
tpm evictcontrol -Q -C o -c key.ctx 0x81000042
tpm nvdefine -Q -C o -s 9 -a 'ownerread|ownerwrite' 0x1500042
printf 'old value' >in; tpm nvwrite -Q -C o -i in 0x1500042
"""
_KEPT = """
tpm readpublic -c 0x81000042
tpm nvread -C o 0x1500042
"""
_PCR = "cat /sys/class/tpm/tpm0/pcr-sha256/12"
_BOOTED_PCRS = "cat /sys/class/tpm/tpm0/pcr-sha256/[0-7]"
_RAW = "export TPM2TOOLS_TCTI=device:/dev/tpm0\n"


def _run(running: Guest, lines: str) -> str:
    return running.read(f"{_RAW}{PRELUDE}{lines}")


def _starts(running: Guest) -> tuple[int, int]:
    """resetCount and restartCount (TPMS_CLOCK_INFO): starts after a TPM2_Shutdown(CLEAR) or none, after one(STATE)."""
    said = _run(running, "tpm2_readclock")
    reset, restart = (re.search(rf"^\s*{name}_count: (\d+)$", said, re.MULTILINE) for name in ("reset", "restart"))
    assert reset, said
    assert restart, said
    return int(reset[1]), int(restart[1])


def _extend(running: Guest) -> str:
    """Extend PCR 12, which nobody else uses and nobody can reset; its value before."""
    before = running.read(_PCR)
    _run(running, f"tpm2_pcrextend 12:sha256={'5a' * 32}")
    assert running.read(_PCR) != before
    return before


@pytest.mark.parametrize("device", TpmDevice, ids=lambda device: device.value)
def test_reset_and_power_off(device: TpmDevice, image: GuestImage) -> None:
    with fresh_directory() as place:
        with tpm_daemon(place) as daemon, guest(image, place, daemon.control, device) as running:
            _run(running, _PREPARE)
            kept = _run(running, _KEPT)
            assert kept.endswith("old value")
            firmware_pcrs = running.read(_BOOTED_PCRS)
            pristine = _extend(running)
            resets, restarts = _starts(running)

            running.reset()
            assert running.read(_PCR) == pristine == "00" * 32
            assert running.read(_BOOTED_PCRS) == firmware_pcrs
            assert _run(running, _KEPT) == kept
            # Without a TPM2_Shutdown from the guest the daemon sends one(STATE). swtpm before 0.8 did not.
            restarted = DaemonKind.chosen() is DaemonKind.CRBD
            assert _starts(running) == ((resets, restarts + 1) if restarted else (resets + 1, 0))

            _extend(running)
            _run(running, "printf 'new value' >in; tpm nvwrite -Q -C o -i in 0x1500042")
            running.power_off()
            # QEMU shuts the TPM down when it ends, and the daemon ends with it.
            assert daemon.wait_ended() == 0

        with tpm_daemon(place, create=False) as daemon, guest(image, place, daemon.control, device) as running:
            assert running.read(_PCR) == pristine
            assert running.read(_BOOTED_PCRS) == firmware_pcrs
            assert _run(running, _KEPT) == kept.replace("old value", "new value")
            # The guest's own TPM2_Shutdown(CLEAR) came first.
            assert _starts(running) == (resets + (1 if restarted else 2), 0)
