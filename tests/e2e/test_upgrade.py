"""A new release under a running guest: from an older wheel to the present one, again and again, and nobody notices."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.control.client import ReplyDecoder
from crbd.control.messages import Outcome, Upgrade, encode_request

from .daemon import TpmDaemon, fresh_directory, tpm_daemon
from .moving import Chain, Side
from .qemu import GuestImage, TpmDevice, guest
from .releases import HANDOVERS, PRESENT, Releases, wheel_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TIMES = 100
PATIENCE = 60.0
LONGEST = 700
"""Milliseconds: of a pause at an upgrade. A driver gives some commands up after 750."""
_FACTS = """
export TPM2TOOLS_TCTI=device:/dev/tpm0
tpm2_getcap handles-transient
tpm2_nvread -C o 0x1500042
"""
_PREPARE = """
export TPM2TOOLS_TCTI=device:/dev/tpm0
set -e
tpm2_createprimary -Q -C o -G ecc -c /tmp/p.ctx
tpm2_nvdefine -Q -C o -s 9 -a 'ownerread|ownerwrite' 0x1500042
printf 'old value' >/tmp/in; tpm2_nvwrite -Q -C o -i /tmp/in 0x1500042
"""
_RSA = """
export TPM2TOOLS_TCTI=device:/dev/tpm0
tpm2_createprimary -C o -G rsa3072 -c /tmp/rsa.ctx >/tmp/rsa.log 2>&1 && echo made || { cat /tmp/rsa.log; echo failed; }
"""


def pauses(daemon: TpmDaemon) -> list[int]:
    """How long clients waited at each upgrade, in milliseconds, as the daemon says in its log."""
    return [int(found) for found in re.findall(r"clients waited (\d+) ms", daemon.log.read_text())]


def upgrade(daemon: TpmDaemon) -> Outcome:
    """Ask for it, and wait for what the one that goes on says."""
    decoder = ReplyDecoder()
    decoder.expect(Upgrade)
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(daemon.control))
        client.sendall(encode_request(Upgrade()))
        while (reply := decoder.next_reply()) is None:
            piece = client.recv(4096)
            assert piece, daemon.said()
            decoder.receive(piece)
    assert isinstance(reply, Outcome)
    return reply


@pytest.fixture(scope="module")
def releases() -> Iterator[Releases]:
    """The present release twice, as `a` and `b`, and every older one whose handover must be understood."""
    with fresh_directory() as place:
        found = Releases(place)
        present = wheel_of("HEAD", PRESENT)
        found.install("a", present)
        found.install("b", present)
        for version, (commit, name) in HANDOVERS.items():
            found.install(f"older-{version}", wheel_of(commit, name))
        yield found


@pytest.mark.parametrize("version", HANDOVERS)
def test_an_older_release_becomes_the_present_one_under_a_guest(
    releases: Releases, image: GuestImage, version: int
) -> None:
    """Then a hundred times itself, while the guest extends a PCR all the time: every extend took place, once."""
    releases.choose(f"older-{version}")
    with (
        fresh_directory() as place,
        tpm_daemon(place, program=[str(releases.program)], options=["--log-level", "info"]) as daemon,
        guest(image, place, daemon.control, TpmDevice.CRB) as running,
    ):
        side = Side(daemon, running)
        running.read(_PREPARE)
        facts = running.read(_FACTS)
        chain = Chain(side)
        chain.reach(side)
        for number in range(TIMES):
            releases.choose("ab"[number % 2])
            said = upgrade(daemon)
            assert said.done, said.text
            first = f"crbd {HANDOVERS[version][1] if number == 0 else PRESENT}"
            assert said.text.decode().startswith(f"crbd {PRESENT} goes on for {first}; "), said.text
        chain.reach(side)
        # Else the driver may have given a command up, and the chain below would only say that it is broken.
        assert max(pauses(daemon)) < LONGEST, sorted(pauses(daemon))
        chain.finish(side)
        assert running.read(_FACTS) == facts
        running.reset()
        assert "old value" in running.read(_FACTS)
        running.power_off()
        assert daemon.wait_ended() == 0


def test_while_a_key_is_made(releases: Releases, image: GuestImage) -> None:
    """The guest gets its key: the upgrade waits for the command."""
    releases.choose("a")
    with (
        fresh_directory() as place,
        tpm_daemon(place, program=[str(releases.program)]) as daemon,
        guest(image, place, daemon.control, TpmDevice.CRB) as running,
    ):
        running.read(f"({_RSA}) >/tmp/said 2>&1 </dev/null &")
        for _ in range(3):
            assert upgrade(daemon).done
        made = "until [ -s /tmp/said ]; do sleep 0.1; done; cat /tmp/said"
        assert running.read(made) == "made"


def test_a_release_that_crashes_when_it_goes_on(releases: Releases, image: GuestImage, tmp_path: Path) -> None:
    """It crashes in the trial too: the guest keeps its TPM, and the answer says what the new one said."""
    broken = Releases(tmp_path)
    for name in ("whole", "broken"):
        broken.install(name, wheel_of("HEAD", PRESENT))
    frozen = next(tmp_path.glob("broken/lib/python*/site-packages/crbd/service/frozen.py"))
    frozen.write_text(frozen.read_text().replace("def thaw_tpm(", "def thaw_tpm(*_: object, **__: object) -> None:\n"
                      "    raise RuntimeError('it was never tested')\n\n\ndef _thaw_tpm("))  # fmt: skip
    broken.choose("whole")
    with (
        fresh_directory() as place,
        tpm_daemon(place, program=[str(broken.program)]) as daemon,
        guest(image, place, daemon.control, TpmDevice.CRB) as running,
    ):
        side = Side(daemon, running)
        chain = Chain(side)
        chain.reach(side)
        broken.choose("broken")
        said = upgrade(daemon)
        assert not said.done
        assert b"it was never tested" in said.text
        chain.reach(side)
        broken.choose("whole")
        assert upgrade(daemon).done
        chain.reach(side)
        chain.finish(side)
