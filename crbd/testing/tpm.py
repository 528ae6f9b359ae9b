"""Ephemeral TPMs, as their users have them.

    with TpmFactory() as factory, factory.make() as tpm:
        subprocess.run(["tpm2_getrandom", "8"], env=os.environ | tpm.environment)

A TPM that is made is started (TPM2_Startup(CLEAR)), empty, and like no other: its seeds are its own. It has one data
client at a time: who has an open ESAPI context cannot run tpm2-tools beside it; they would wait for it to be closed.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from crbd.errors import DaemonError, EngineFailedError, OperatorError, TssMissingError
from crbd.testing import leash as leashes
from crbd.testing import places, steering

if TYPE_CHECKING:
    from tpm2_pytss import ESAPI

PATIENCE: Final = 30.0
"""Seconds that a TPM may take to begin, to answer its keeper, and to end."""
_FACTORY: Final = (
    "import sys; sys.path.append(sys.argv[1]); from crbd.testing.factory import main; raise SystemExit(main())"
)


class Leash:
    """The keeper's end of a leash (crbd.testing.leash)."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        end.settimeout(PATIENCE)

    def fileno(self) -> int:
        """Readable when the TPM has ended, if it was not asked for anything."""
        return self._end.fileno()

    def wait_until_ready(self) -> None:
        """Return when the TPM is. Raises the OperatorError that keeps it from beginning."""
        self._receive()

    def ask(self, **request: object) -> dict[str, object]:
        """The answer. Raises the OperatorError that it is, DaemonError where there is none."""
        try:
            self._end.send(leashes.packet(**request))
        except OSError as error:
            raise DaemonError(f"the TPM has ended ({error.strerror})", "see what it said") from error
        return self._receive()

    def _receive(self) -> dict[str, object]:
        try:
            content = leashes.content_of(self._end.recv(leashes.MAX_PACKET))
        except OSError as error:
            raise DaemonError(f"the TPM does not answer ({error})", "see what it said") from error
        refusal = leashes.refused(content)
        if refusal is not None:
            raise refusal
        if not content:
            raise DaemonError("the TPM has ended", "see what it said")
        return content

    def let_go(self) -> None:
        """Have the TPM end, and return when it has. Raises DaemonError where it does not."""
        with self._end:
            try:
                self._end.shutdown(socket.SHUT_WR)
                while self._end.recv(leashes.MAX_PACKET):
                    pass
            except TimeoutError as error:
                raise DaemonError(f"the TPM does not end within {PATIENCE:.0f} s", "see what it said") from error
            except OSError:
                # It is gone already.
                return


class InjectedFaults:
    """The faults of one block."""

    def __init__(self, leash: Leash) -> None:
        self._leash = leash
        self._final: int | None = None

    @property
    def struck(self) -> int:
        """How many times one has struck, also when the block is over. A test that expects a fault should look."""
        return self._asked() if self._final is None else self._final

    def end(self) -> None:
        """No more faults."""
        self._final = self._asked()
        self._leash.ask(faults="")

    def _asked(self) -> int:
        return int(str(self._leash.ask(faults=None)["struck"]))


class EphemeralTpm:
    """A TPM that is there for this process, in a process of its own. Ends with `close`, or with this process."""

    def __init__(self, place: Path, leash: Leash) -> None:
        """`place` is its private directory, which it removes at its end."""
        self._place = place
        self._leash = leash
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the TPM. Closing a closed one is no error. Raises DaemonError."""
        if not self._closed:
            self._closed = True
            self._leash.let_go()
            shutil.rmtree(self._place, ignore_errors=True)

    # -- how it is reached

    @property
    def tcti(self) -> str:
        """The TCTI string of tpm2-tss, tpm2-tools and all on top of them."""
        return places.tcti(self._place)

    @property
    def socket(self) -> Path:
        """The data channel's UNIX socket: TPM commands and responses as they are."""
        return self._place / places.DATA

    @property
    def control(self) -> Path:
        """The control channel's UNIX socket (docs/control-channel.md): what QEMU's -chardev socket connects to."""
        return self._place / places.CONTROL

    @property
    def directory(self) -> Path:
        """Its private directory, where there is room for what belongs to it. It is gone with the TPM."""
        return self._place

    @property
    def environment(self) -> dict[str, str]:
        """The variables that make other programs use this TPM."""
        return places.environment(self._place, os.environ)

    @property
    def log(self) -> str:
        """What its process has said so far."""
        try:
            return (self._place / places.LOG).read_text(errors="replace")
        except FileNotFoundError:
            return ""

    @contextmanager
    def esapi(self) -> Iterator[ESAPI]:
        """A connection to it, as tpm2-pytss has them. Raises TssMissingError without tpm2-pytss."""
        try:
            tss = import_module("tpm2_pytss")
        except ImportError as error:
            raise TssMissingError(f"tpm2-pytss cannot be imported ({error})", "pip install 'crbd[tss]'") from error
        name, _, configuration = self.tcti.partition(":")
        with tss.TCTILdr(name, configuration) as tcti, tss.ESAPI(tcti) as context:
            yield context

    # -- what happens to it

    def reset(self) -> None:
        """As if its machine was reset: power off (with TPM2_Shutdown) and on, then TPM2_Startup(CLEAR).

        Open connections stay. Raises DaemonError.
        """
        steering.reset(self.control)

    def snapshot(self) -> bytes:
        """All that it is now: keys, NV, PCRs, sessions, objects. Raises DaemonError."""
        return steering.take_snapshot(self.control)

    def restore(self, snapshot: bytes) -> None:
        """Be as a snapshot says, of this TPM or another one. Open connections stay. Raises DaemonError."""
        steering.restore(self.control, snapshot)

    @contextmanager
    def faults(self, faults: str) -> Iterator[InjectedFaults]:
        """Have commands fail as crbd.service.faults says (docs/ci.md), within the block, instead of as before.

        Failure mode outlasts it, up to `reset`. Raises UsageError where they are not understood.
        """
        self._leash.ask(faults=faults)
        injected = InjectedFaults(self._leash)
        try:
            yield injected
        finally:
            if not self._closed:
                injected.end()


class TpmFactory:
    """Makes TPMs, quickly (crbd.testing.factory). For one thread at a time."""

    def __init__(self, library: str | None = None) -> None:
        """`library` is the libtpms to load; the system's if None."""
        self._library = library
        self._requests, theirs = socket.socketpair()
        root = Path(__file__).resolve().parents[2]
        command = [sys.executable, "-P", "-c", _FACTORY, str(root), str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, process_group=0
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def make(self, snapshot: bytes | None = None) -> EphemeralTpm:
        """A new TPM, or one that is as a snapshot says. Raises an OperatorError that says why there is none."""
        ours, theirs = leashes.pair()
        leash, place = Leash(ours), places.private_directory()
        try:
            with theirs:
                self._order(place, theirs)
            leash.wait_until_ready()
            tpm = EphemeralTpm(place, leash)
            if snapshot is not None:
                tpm.restore(snapshot)
        except OperatorError as error:
            # Its directory is about to go, and what it said last with it.
            if said := _last_line(place / places.LOG):
                error.add_note(f"its process said: {said}")
            leash.let_go()
            shutil.rmtree(place, ignore_errors=True)
            raise
        return tpm

    def _order(self, place: Path, leash: socket.socket) -> None:
        request = json.dumps({"place": str(place), "library": self._library}).encode()
        try:
            with (place / places.LOG).open("wb") as output:
                socket.send_fds(self._requests, [request], [leash.fileno(), output.fileno()])
        except OSError as error:
            raise EngineFailedError(f"no TPM can be made: {error}", "see what is on stderr") from error

    def close(self) -> None:
        """Make no more TPMs; those that are there stay. Closing a closed one is no error."""
        self._requests.close()
        self._process.wait(PATIENCE)


def _last_line(log: Path) -> str:
    try:
        return (log.read_text(errors="replace").strip().splitlines() or [""])[-1]
    except FileNotFoundError:
        return ""
