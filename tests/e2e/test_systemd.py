"""The units under a real systemd: start, reload, restart, crash, stop, socket activation, credentials, watchdog."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.cli.test_reload import CAPABILITIES, GET_CAPABILITY, Client
from tests.engine import commands as c

from .daemon import fresh_directory
from .systemd_bed import UNITS, Machine, machine

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXPOSURE = 1.5
"""The most that systemd-analyze security may find."""
OPTIONS = "CRBD_OPTIONS=--create --flags startup-clear"


@pytest.fixture(scope="module")
def booted() -> Iterator[Machine]:
    with fresh_directory() as place, machine(place) as running:
        yield running


class Tpm:
    """One instance of the units, with its data channel."""

    def __init__(self, booted: Machine, name: str, options: str = OPTIONS) -> None:
        self.machine = booted
        self.unit = f"crbd@{name}.service"
        self.name = name
        booted.run(f"echo '{options}' > /etc/crbd/{name}.env")
        booted.run(f"systemctl start crbd-data@{name}.socket {self.unit}")

    @property
    def pid(self) -> str:
        return self.machine.property(self.unit, "MainPID")

    @property
    def said(self) -> str:
        return self.machine.run(f"journalctl --no-pager --quiet -o cat -u {self.unit}")

    def client(self, channel: str) -> Client:
        return Client(self.machine.path(f"/run/crbd/{self.name}/{channel}"))


def prepare(data: Client) -> bytes:
    assert c.code(data.run(c.pcr_extend(16, b"\x16" * 32))) == c.SUCCESS
    assert c.code(data.run(c.nv_define(8))) == c.SUCCESS
    assert c.code(data.run(c.nv_write(b"12345678"))) == c.SUCCESS
    return data.run(c.pcr_read(16))


def test_reload_and_restart_keep_connections(booted: Machine) -> None:
    tpm = Tpm(booted, "vm1")
    assert booted.property(tpm.unit, "StatusText").startswith("serving the TPM in /var/lib/crbd/vm1")
    with ExitStack() as clients:
        data, ctrl = (clients.enter_context(tpm.client(channel)) for channel in ("data", "ctrl"))
        before = prepare(data)
        assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
        pid = tpm.pid
        booted.run(f"systemctl reload {tpm.unit}")
        assert tpm.pid == pid
        assert data.run(c.pcr_read(16)) == before
        for _ in range(3):
            pid = tpm.pid
            booted.run(f"systemctl restart {tpm.unit}")
            assert tpm.pid != pid, tpm.said
            assert data.run(c.pcr_read(16)) == before, tpm.said
            assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
            assert ctrl.ask(GET_CAPABILITY, 8) == CAPABILITIES
            assert booted.property(tpm.unit, "NFileDescriptorStore") == "0"
        booted.run(f"systemctl reload {tpm.unit}")
        assert data.run(c.pcr_read(16)) == before
        booted.run("systemctl restart crbd.target")
        assert data.run(c.pcr_read(16)) == before
        booted.run(f"systemctl stop {tpm.unit}")
        assert data.receive(1) == b""
        assert booted.property(tpm.unit, "NFileDescriptorStore") == "0"
    assert "was not shut down" not in tpm.said
    with tpm.client("data") as data:
        # The socket unit starts it again.
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
        assert data.run(c.pcr_read(16)) != before
    assert "was not shut down" not in tpm.said
    booted.run(f"systemctl stop crbd@{tpm.name}.socket")
    assert booted.property(tpm.unit, "ActiveState") == "inactive"


def test_a_crash_is_repaired(booted: Machine) -> None:
    tpm = Tpm(booted, "vm2")
    with tpm.client("data") as data:
        before = prepare(data)
        pid = tpm.pid
        booted.run(f"kill -9 {pid}")
        assert data.receive(1) == b""
    with tpm.client("data") as data:
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
        assert data.run(c.pcr_read(16)) != before
    assert tpm.pid not in (pid, "0")
    assert "was not shut down" in tpm.said


def test_a_new_release_by_restart_and_one_that_cannot_go_on(booted: Machine) -> None:
    """A restart has no way back to the old program: where the new one cannot go on, it begins from the TPM at rest."""
    tpm = Tpm(booted, "vm3")
    with tpm.client("data") as data:
        before = prepare(data)
        frozen = "/opt/crbd/lib/python3.11/site-packages/crbd/service/frozen.py"
        broken = "def thaw_tpm(*_: object) -> None:\\n    raise StateDamagedError('no, not like this')\\n"
        booted.run(f'cp {frozen} /tmp/whole; printf "\\n\\n{broken}" >> {frozen}')
        try:
            refused = booted.run(f"systemctl reload {tpm.unit}", status=1)
            assert "failed" in refused
            assert "no, not like this" in tpm.said
            assert data.run(c.pcr_read(16)) == before
            booted.run(f"systemctl restart {tpm.unit}", status=None)
            booted.wait_until(f"systemctl is-active {tpm.unit}")
            assert data.receive(1) == b""
        finally:
            booted.run(f"cp /tmp/whole {frozen}")
    with tpm.client("data") as data:
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
    assert "was not shut down" not in tpm.said


def test_a_key_by_a_credential(booted: Machine) -> None:
    booted.run(
        "mkdir -p /etc/systemd/system/crbd@vm4.service.d; head -c 32 /dev/urandom > /etc/crbd/vm4.key;"
        "printf '[Service]\\nLoadCredential=key:/etc/crbd/vm4.key\\n' "
        "> /etc/systemd/system/crbd@vm4.service.d/key.conf;"
        "systemctl daemon-reload"
    )
    tpm = Tpm(booted, "vm4", f"{OPTIONS} --key credential:key")
    with tpm.client("data") as data:
        before = prepare(data)
        booted.run(f"systemctl restart {tpm.unit}")
        assert data.run(c.pcr_read(16)) == before, tpm.said


def test_a_start_that_fails_says_why(booted: Machine) -> None:
    booted.run("printf 'CRBD_OPTIONS=\\n' > /etc/crbd/vm5.env")
    booted.run("systemctl start crbd@vm5.service", status=1)
    booted.wait_until("test $(systemctl show -p Result --value crbd@vm5) != success")
    assert "there is no TPM state in /var/lib/crbd/vm5" in booted.property("crbd@vm5", "StatusText")
    assert booted.property("crbd@vm5", "StatusErrno") == "2"
    booted.run("systemctl stop crbd@vm5.socket crbd@vm5.service; systemctl reset-failed")


def test_the_watchdog_ends_what_hangs(booted: Machine) -> None:
    booted.run(
        "mkdir -p /etc/systemd/system/crbd@vm6.service.d;"
        "printf '[Service]\\nWatchdogSec=3s\\n' > /etc/systemd/system/crbd@vm6.service.d/watchdog.conf;"
        "systemctl daemon-reload"
    )
    tpm = Tpm(booted, "vm6")
    with tpm.client("data") as data:
        prepare(data)
        pid = tpm.pid
        booted.run(f"kill -{signal.SIGSTOP.value} {pid}")
        booted.wait_until(f"test $(systemctl show -p MainPID --value {tpm.unit}) -ne {pid}")
    with tpm.client("data") as data:
        assert c.nv_value(data.run(c.nv_read(8))) == b"12345678"
    assert "Watchdog timeout" in tpm.said


def test_the_units_are_well_formed_and_closed(booted: Machine) -> None:
    units = " ".join(
        f"/usr/lib/systemd/system/{path.name}"
        for path in sorted(UNITS.iterdir())
        if path.suffix in (".service", ".socket", ".target")
    )
    assert booted.run(f"systemd-analyze verify --man=no {units}") == ""
    said = booted.run("systemd-analyze security --no-pager crbd@vm1.service", status=None)
    found = re.search(r"Overall exposure level for crbd@vm1.service: ([0-9.]+)", said)
    assert found, said
    assert float(found[1]) <= EXPOSURE, said
    tpm = Tpm(booted, "vm1")

    assert "NoNewPrivs:\t1" in booted.run(f"cat /proc/{tpm.pid}/status")
