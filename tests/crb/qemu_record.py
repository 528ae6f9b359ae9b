"""Records the traces in vectors/ from a QEMU: `python -m tests.crb.qemu_record --out DIR`; see vectors/README.md."""

from __future__ import annotations

import argparse
import datetime
import inspect
import shlex
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.e2e.daemon import DaemonKind, tpm_daemon

from . import qemu_scenarios as accesses
from . import qemu_scenarios_execution as execution
from .qemu_backend import ScriptedBackend
from .qemu_machine import DaemonOracle, Qemu, ScriptedOracle, machine, machine_arguments
from .qemu_recorder import DaemonRecorder, Recorder, ScriptedRecorder
from .qemu_trace import Config, Trace, dump

TPM_BUFFER: Final = 4096
"""libtpms' buffer in bytes, and that of the scripted TPM where nothing else is said."""
LARGE_BUFFER: Final = 8192
"""A buffer in bytes that takes three pieces."""
WITHOUT_CHUNKS: Final = "pc-q35-11.0"
"""A machine type of QEMU 11.1 whose tpm-crb has chunked transfers off."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """What one trace is made from. `chunked`: it is recorded only where QEMU has chunked transfers."""

    play: Callable[[ScriptedRecorder], None] | Callable[[DaemonRecorder], None]
    scripted: bool = True
    chunked: bool = False
    buffer_size: int = TPM_BUFFER
    machine: str = "q35"
    suffix: str = ""

    @property
    def name(self) -> str:
        """The trace's, without the device's."""
        return self.play.__name__.replace("_", "-") + self.suffix

    @property
    def about(self) -> str:
        """The docstring, in one line."""
        return " ".join((inspect.getdoc(self.play) or "").split())


SCENARIOS: Final = (
    Scenario(accesses.reset_values),
    Scenario(accesses.reset_values, chunked=True, machine=WITHOUT_CHUNKS, suffix="-chunks-off"),
    Scenario(accesses.start_patterns, chunked=True, machine=WITHOUT_CHUNKS, suffix="-chunks-off"),
    Scenario(execution.command_sizes, chunked=True, machine=WITHOUT_CHUNKS, suffix="-chunks-off"),
    Scenario(accesses.read_widths),
    Scenario(accesses.write_patterns_1),
    Scenario(accesses.write_patterns_2),
    Scenario(accesses.write_patterns_4),
    Scenario(accesses.write_patterns_8),
    Scenario(accesses.write_reserved),
    Scenario(accesses.write_unaligned),
    Scenario(accesses.start_patterns),
    Scenario(accesses.locality),
    Scenario(accesses.idle_and_ready),
    Scenario(accesses.buffer_writes),
    Scenario(accesses.absent_localities),
    Scenario(accesses.established),
    Scenario(accesses.established_from_start),
    Scenario(accesses.resets),
    Scenario(execution.start_without_locality),
    Scenario(execution.start_in_idle),
    Scenario(execution.accesses_in_execution),
    Scenario(execution.buffer_in_execution),
    Scenario(execution.cancel),
    Scenario(execution.command_sizes),
    Scenario(execution.response_sizes),
    Scenario(execution.failure),
    Scenario(execution.chunk_bits),
    Scenario(execution.chunk_bits, chunked=True, machine=WITHOUT_CHUNKS, suffix="-chunks-off"),
    Scenario(execution.chunks, chunked=True, buffer_size=LARGE_BUFFER),
    Scenario(execution.chunk_retry, chunked=True, buffer_size=LARGE_BUFFER),
    Scenario(execution.chunk_overrun, chunked=True, buffer_size=LARGE_BUFFER),
    Scenario(execution.chunk_abandoned, chunked=True, buffer_size=LARGE_BUFFER),
    Scenario(execution.chunk_errors, chunked=True, buffer_size=LARGE_BUFFER),
    Scenario(execution.chunk_limit_4096, chunked=True),
    Scenario(execution.commands, scripted=False),
    Scenario(execution.long_commands, scripted=False),
    Scenario(execution.tpm_killed, scripted=False),
    Scenario(execution.chunked_command_to_tpm, scripted=False, chunked=True),
)


@contextmanager
def scripted_oracle(qemu: Qemu, config: Config) -> Iterator[ScriptedOracle]:
    """A fresh QEMU with a scripted TPM behind it."""
    with ScriptedBackend(config.buffer_size) as tpm, machine(qemu, tpm.qemu_end, config.machine) as running:
        yield ScriptedOracle(running, tpm)


@contextmanager
def daemon_oracle(qemu: Qemu, kind: str) -> Iterator[DaemonOracle]:
    """A fresh QEMU with a TPM daemon behind it: crbd, or what CRBD_E2E_DAEMON names."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        daemon = stack.enter_context(tpm_daemon(directory))
        control = stack.enter_context(socket.socket(socket.AF_UNIX))
        control.connect(str(daemon.control))
        yield DaemonOracle(stack.enter_context(machine(qemu, control, kind)), daemon.process)


def record(qemu: Qemu, scenario: Scenario) -> Trace:
    """Play one scenario on a fresh QEMU."""
    device = qemu.device()
    chunks = device == "qemu-11" and scenario.machine != WITHOUT_CHUNKS
    config = Config(device, scenario.buffer_size, chunks, scenario.machine, scenario.scripted)
    chroot = ' --chroot "$(scripts/qemu11-chroot)"' if qemu.chroot else ""
    provenance = {
        "trace": scenario.about,
        "qemu": qemu.version(),
        "machine": shlex.join(machine_arguments(scenario.machine)),
        "tpm": "scripted (tests/crb/qemu_backend.py)" if scenario.scripted else DaemonKind.chosen().value,
        "recorded": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m tests.crb.qemu_record{chroot} --only {scenario.name} --out tests/crb/vectors",
    }
    with ExitStack() as stack:
        recorder: Recorder
        if scenario.scripted:
            recorder = ScriptedRecorder(stack.enter_context(scripted_oracle(qemu, config)))
        else:
            recorder = DaemonRecorder(stack.enter_context(daemon_oracle(qemu, config.machine)))
        play: Callable[..., None] = scenario.play
        play(recorder)
        return Trace(provenance, config, tuple(recorder.steps))


def _main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.crb.qemu_record", description=__doc__)
    parser.add_argument("--qemu", default="qemu-system-x86_64", metavar="PATH", help="default: %(default)s")
    parser.add_argument("--chroot", type=Path, metavar="DIR", help="run it in this chroot (see scripts/qemu11-chroot)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="files that exist there are left alone")
    parser.add_argument("--only", metavar="NAME", help="record this trace alone")
    options = parser.parse_args()
    qemu = Qemu(options.qemu, options.chroot)
    device = qemu.device()
    options.out.mkdir(parents=True, exist_ok=True)
    for scenario in SCENARIOS:
        path = options.out / f"{device}-{scenario.name}.json"
        if options.only not in (None, scenario.name) or (scenario.chunked and device != "qemu-11"):
            continue
        if path.exists():
            print(f"{path} exists, and is left as it is", file=sys.stderr)
            continue
        path.write_text(dump(record(qemu, scenario)), encoding="ascii")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(_main())
