"""A guest that moves from one QEMU and TPM daemon to another while it extends a PCR.

Under TCG a page that the guest writes while QEMU copies it may be missed, and the guest's kernel falls over. So where a
running guest is to arrive, its memory is a file that both QEMUs map (`Place.common_memory`), as in a local migration of
QEMU's own; else it is halted first.

A `Side` is a QEMU and a daemon. What the guest did is proven by its PCR: `Chain` starts a loop in the guest that
extends PCR 12 with 1, 2, 3, … as 256-bit numbers and notes how far it came; the PCR must be what that many extends make
of it. A lost, a doubled or a rolled back extend shows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .console import Monitor
from .daemon import DaemonKind, TpmDaemon, tpm_daemon
from .qemu import Guest, GuestImage, TpmDevice, guest
from .waiting import Deadline, DeadlineError

INCOMING = ("-incoming", "defer")
_LOOP = """
export TPM2TOOLS_TCTI=device:/dev/tpmrm0
setsid sh -c '
    n=0
    until [ -e /tmp/stop ]; do
        n=$((n + 1))
        tpm2_pcrextend 12:sha256=$(printf %064x $n) || echo $n >>/tmp/failed
        echo $n >/tmp/count.new; mv /tmp/count.new /tmp/count
    done
    touch /tmp/stopped
' >/tmp/loop.log 2>&1 </dev/null &
"""
_STOP = """
touch /tmp/stop
tries=0
until [ -e /tmp/stopped ]; do sleep 0.1; tries=$((tries + 1)); [ $tries -lt 200 ] || exit 9; done
cat /tmp/failed /tmp/loop.log 2>/dev/null
echo "count $(cat /tmp/count)"
cat /sys/class/tpm/tpm0/pcr-sha256/12
"""
_AWAIT = """
tries=0
until [ "$(cat /tmp/count 2>/dev/null || echo 0)" -ge {} ]; do
    sleep 0.1; tries=$((tries + 1)); [ $tries -lt 300 ] || {{ cat /tmp/loop.log; exit 9; }}
done
cat /tmp/count
"""


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a migration."""

    daemon: TpmDaemon
    guest: Guest

    @property
    def monitor(self) -> Monitor:
        """Of its QEMU."""
        return self.guest.monitor

    def kill(self) -> None:
        """Kill both, as a power cut would."""
        self.guest.kill()
        self.daemon.process.kill()
        self.daemon.process.wait()


@dataclass(frozen=True, slots=True)
class Place:
    """Where both sides live: one directory each for sockets and logs, and for the TPM's state one each or a common one.

    On common storage the lock is handed over.
    """

    root: Path
    image: GuestImage
    device: TpmDevice = TpmDevice.CRB
    shared: bool = False
    common_memory: bool = False

    @contextmanager
    def side(
        self,
        name: str,
        *,
        incoming: bool = False,
        kind: DaemonKind = DaemonKind.CRBD,
        options: Sequence[str] = (),
        machine: Sequence[str] = (),
    ) -> Iterator[Side]:
        """A daemon and a guest that boots, or (`incoming`) waits for `receive`."""
        directory = self.root / name
        directory.mkdir(exist_ok=True)
        state = self.root / "state" if self.shared else directory / "state"
        handover = [*(["release-lock-outgoing"] if self.shared else []), *(["incoming"] if incoming else [])]
        if kind is DaemonKind.CRBD and handover:  # Debian 12's swtpm has no such option
            options = [*options, "--migration", ",".join(handover)]
        machine = [*machine, *(INCOMING if incoming else ())]
        if self.common_memory:
            memory = f"memory-backend-file,id=memory,size=512M,mem-path={self.root}/memory,share=on"
            machine += ["-object", memory, "-machine", "memory-backend=memory"]
        with (
            # A destination has no permission to make a TPM, and needs none.
            tpm_daemon(directory, create=not incoming, kind=kind, state=state, options=options) as daemon,
            guest(self.image, directory, daemon.control, self.device, options=machine, booted=not incoming) as running,
        ):
            capabilities = ("events", "x-ignore-shared") if self.common_memory else ("events",)
            running.monitor.execute("migrate-set-capabilities", _capabilities(*capabilities))
            running.monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 30})
            yield Side(daemon, running)


def _capabilities(*names: str, state: bool = True) -> dict[str, object]:
    return {"capabilities": [{"capability": name, "state": state} for name in names]}


def enable(side: Side, *capabilities: str) -> None:
    """Switch migration capabilities on."""
    side.monitor.execute("migrate-set-capabilities", _capabilities(*capabilities))


def throttle(side: Side, bytes_per_second: int) -> None:
    """Let the migration out take long."""
    side.monitor.execute("migrate-set-parameters", {"max-bandwidth": bytes_per_second})


def await_migration(side: Side, *wanted: str, seconds: float = 30) -> str:
    """Until the migration is in one of these states; which it is."""
    deadline = Deadline(seconds)
    while not deadline.passed:
        status: str = side.monitor.await_event("MIGRATION", deadline.remaining())["data"]["status"]
        if status in wanted:
            return status
        assert status != "failed", f"the migration failed; the daemon said:\n{side.daemon.said()}"
    raise DeadlineError(f"the migration is not {' or '.join(wanted)}")


def move(source: Side, destination: Side, root: Path) -> None:
    """Live from one to the other, to the end."""
    uri = f"unix:{root}/migration"
    destination.monitor.execute("migrate-incoming", {"uri": uri})
    source.monitor.execute("migrate", {"uri": uri})
    await_migration(source, "completed")
    await_migration(destination, "completed")


def run_job(side: Side, command: str, arguments: dict[str, object]) -> None:
    """Run one of QMP's jobs to its good end."""
    side.monitor.execute(command, {"job-id": "job", **arguments})
    while side.monitor.await_event("JOB_STATUS_CHANGE")["data"]["status"] != "concluded":
        pass
    (job,) = side.monitor.execute("query-jobs")
    assert "error" not in job, job
    side.monitor.execute("job-dismiss", {"id": "job"})


class Chain:
    """The loop in the guest and its PCR 12."""

    def __init__(self, side: Side) -> None:
        """Start it."""
        side.guest.read(_LOOP)

    def reach(self, side: Side, more: int = 3) -> int:
        """Until the guest, which runs on that side, came further by so many extends; how far it came then."""
        now = int(side.guest.read("cat /tmp/count 2>/dev/null || echo 0"))
        return int(side.guest.read(_AWAIT.format(now + more)))

    def finish(self, side: Side) -> None:
        """Stop it and see that every extend took place, once, and none failed."""
        said = side.guest.read(_STOP).splitlines()
        assert said[0].startswith("count "), "\n".join(said) + side.daemon.said()
        count, value = int(said[0].removeprefix("count ")), said[1].lower()
        expected = bytes(32)
        for number in range(1, count + 1):
            expected = hashlib.sha256(expected + number.to_bytes(32, "big")).digest()
        assert value == expected.hex(), f"after {count} extends"
