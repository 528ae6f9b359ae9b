"""`crbd serve`: one TPM, served until it is told to end."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from uuid import UUID

import trio

from crbd.cli import faults, walls
from crbd.cli.keys import read_key, read_passphrase
from crbd.cli.swtpm_key import read_swtpm_key
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import OperatorError, UsageError
from crbd.server.daemon import serve
from crbd.server.endpoint import DescriptorEndpoint, Endpoint, parse_endpoint
from crbd.server.fdstore import left_behind, sorted_out
from crbd.server.options import DaemonOptions
from crbd.server.succession import Inheritance, Program, inheritance, rehearse
from crbd.server.supervision import tell_failure
from crbd.server.walls import forbid_core_dumps
from crbd.service.injection import FaultyStore
from crbd.service.options import CheckpointPolicy, InstanceOptions, Startup
from crbd.state.keys import UserKey
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import NewTpm
from crbd.store.layout import Layout, open_state
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from crbd.systemd.listen import passed_descriptors

DESCRIPTION = """Serve one TPM 2.0: the control channel to QEMU (-chardev socket), the data channel to tpm2-tools and
others.
Ends with status 0 at SIGTERM or when a client sends SHUTDOWN; docs/exit-codes.md lists the others."""

FLAGS = {
    "not-need-init": "power the TPM on at once instead of waiting for INIT",
    "startup-clear": "power on and send TPM2_Startup(CLEAR)",
    "startup-state": "power on and send TPM2_Startup(STATE)",
    "startup-none": "send no TPM2_Startup (implies not-need-init)",
    "disable-auto-shutdown": "never send TPM2_Shutdown for a client",
}
LOCALITY_SETTINGS = {
    "reject-locality-4": "refuse locality 4 from clients",
    "allow-set-locality": "let the data channel change the locality by the vendor command 0x20001000",
}
MIGRATION_SETTINGS = {
    "incoming": "state comes from another host: leave the state unlocked until it comes (shared storage)",
    "release-lock-outgoing": "unlock the state once it was sent to another host (shared storage)",
}
SHORTEST_PAUSE, LONGEST_PAUSE = 0.1, 86400
"""Seconds that --checkpoint may say."""
LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `crbd serve`."""
    where = parser.add_argument_group("state (one of these is needed)")
    where.add_argument(
        "--state", metavar="DIR", type=Path, help="directory that holds the TPM's state, or swtpm's linear file"
    )
    where.add_argument("--ephemeral", action="store_true", help="a new TPM that is gone when crbd ends")
    where.add_argument(
        "--layout",
        choices=[layout.value for layout in Layout],
        help="layout of new state: crbd (default), swtpm, or linear (one file); what is there is opened as it is",
    )
    parser.add_argument(
        "--key", metavar="SOURCE", help="seal the state with this key: file:PATH, fd:N, credential:NAME, exec:PROGRAM"
    )
    parser.add_argument("--passphrase", metavar="SOURCE", help="the same with a passphrase")
    parser.add_argument(
        "--swtpm-key",
        metavar="KEY",
        help="key of state in swtpm's layouts, as swtpm's --key has it: file=PATH[,mode=...], pwdfile=PATH, ...",
    )
    parser.add_argument("--name", default="", help="what a new TPM is called, for people")
    parser.add_argument(
        "--uuid", type=UUID, help="the instance that DIR must hold, or that is made: another one's state is an error"
    )
    new = parser.add_mutually_exclusive_group()
    new.add_argument(
        "--create", action="store_true", help="make a new TPM if DIR holds none; without it, no state is an error"
    )
    new.add_argument("--require-existing", action="store_true", help="say so: no state is an error (the default)")
    sockets = parser.add_argument_group("sockets (at least one): unix:PATH[,mode=0660], tcp:HOST:PORT or fd:NUMBER")
    sockets.add_argument("--ctrl", metavar="ENDPOINT", help="control channel: what QEMU's -chardev socket connects to")
    sockets.add_argument("--data", metavar="ENDPOINT", help="data channel: TPM commands")
    sockets.add_argument(
        "--registers",
        metavar="vfio-user:PATH[,mode=0660]",
        help="CRB registers as a PCI device: what QEMU's -device vfio-user-pci connects to",
    )
    parser.add_argument("--flags", metavar="LIST", default="", help="comma-separated: " + ", ".join(FLAGS))
    parser.add_argument(
        "--locality", metavar="LIST", default="", help="comma-separated: " + ", ".join(LOCALITY_SETTINGS)
    )
    parser.add_argument(
        "--migration", metavar="LIST", default="", help="comma-separated: " + ", ".join(MIGRATION_SETTINGS)
    )
    parser.add_argument(
        "--migration-key",
        metavar="SPEC",
        help="encrypt state sent to another host: pwdfile=PATH, file=PATH,mode=aes-256-cbc, or what else swtpm takes",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="WHEN",
        default="never",
        help="store volatile state for the case that crbd dies: never (default), every-command, or SECONDS, when "
        "the TPM has not been used for so long",
    )
    parser.add_argument("--pid", metavar="FILE", type=Path, help="write the process id there when clients are served")
    parser.add_argument(
        "--fd-store",
        action="store_true",
        help="at SIGTERM leave the clients to systemd (FileDescriptorStoreMax=), so that a restart keeps them",
    )
    parser.add_argument(
        "--libtpms", metavar="FILE", help="the libtpms library to load (default: libtpms.so.0 of the system)"
    )
    faults.add_option(parser)
    walls.add_options(parser)
    parser.add_argument(
        "--log-level", choices=LOG_LEVELS, default="warning", help="what goes to stderr (default: warning)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until the end; returns 0. Raises OperatorError when the start fails; the service manager is told of it."""
    try:
        return _run(arguments)
    except OperatorError as error:
        tell_failure(error)
        raise


def _run(arguments: argparse.Namespace) -> int:
    forbid_core_dumps()
    program = Program.of_this_process()
    inherited = inheritance(arguments.libtpms)
    logging.basicConfig(stream=sys.stderr, level=arguments.log_level.upper(), format="crbd: %(levelname)s: %(message)s")
    swtpm_key = _swtpm_key(arguments.swtpm_key, "--swtpm-key", inherited, "file")
    sockets, kept = sorted_out(passed_descriptors())
    options = _daemon_options(arguments, sockets, swtpm_key, inherited)
    options = walls.with_access(arguments, options, anew=inherited is None)
    if arguments.state is not None and arguments.ephemeral:
        raise UsageError("--state and --ephemeral exclude each other", "give one of them")
    if arguments.state is None and not arguments.ephemeral:
        raise UsageError("nothing says where the TPM's state is", "give --state DIR or --ephemeral")
    if arguments.ephemeral:
        _refuse_beside_ephemeral(arguments)
    make_engine: Callable[[StatePort], Engine] = partial(_make_engine, library=arguments.libtpms)
    planned = None if arguments.faults is None else faults.Planned(arguments.faults)
    if planned is not None:
        make_engine = planned.failing(make_engine)
    if inherited is not None and inherited.trial:
        rehearse(inherited, options.instance, make_engine)
        return 0
    # Keys were read like at any start until here: what a service manager kept has none.
    inherited = inherited or left_behind(kept)
    if arguments.ephemeral:
        store: Store = MemoryStore()
        if inherited is not None:
            store = MemoryStore(inherited.handover.held, inherited.handover.held_side)
    else:
        store = _open_state(arguments, swtpm_key, inherited)
        _refuse_checkpoints_elsewhere(options.instance, store)
    if planned is not None:
        store = FaultyStore(store, planned.plan)
    wanted = walls.walls_of(arguments, options, program)
    serving = partial(serve, program=wanted.program, inherited=inherited, wall_in=wanted.raise_all)
    ready = None if planned is None else planned.begin
    trio.run(partial(serving, options, store, make_engine, ready=ready))
    return 0


def _swtpm_key(spec: str | None, option: str, inherited: Inheritance | None, name: str) -> SwtpmKey | None:
    """The key of an option; from the process before this one where there was one, as it may be there no more."""
    if spec is None:
        return None
    return read_swtpm_key(spec, option) if inherited is None else inherited.swtpm_key(name)


def _refuse_beside_ephemeral(arguments: argparse.Namespace) -> None:
    """What speaks of state at rest. Raises UsageError."""
    if arguments.checkpoint != "never":
        raise UsageError("--checkpoint is for state that is kept, and --ephemeral keeps none", "leave one out")
    for option in ("key", "passphrase", "swtpm_key", "layout", "uuid", "require_existing"):
        if getattr(arguments, option):
            raise UsageError(
                f"--{option.replace('_', '-')} is for state that is kept, and --ephemeral keeps none", "leave one out"
            )


def _open_state(arguments: argparse.Namespace, swtpm_key: SwtpmKey | None, inherited: Inheritance | None) -> Store:
    keys: list[UserKey] = []
    data_key = b"" if inherited is None else inherited.handover.secrets.get("seal", b"")
    if arguments.key is not None and not data_key:
        keys.append(read_key(arguments.key))
    if arguments.passphrase is not None and not data_key:
        keys.append(read_passphrase(arguments.passphrase))
    incoming = "incoming" in _migration(arguments)
    return open_state(
        arguments.state,
        create=arguments.create or incoming,
        layout=None if arguments.layout is None else Layout(arguments.layout),
        new=NewTpm(arguments.name, tuple(keys), data_key),
        swtpm_key=swtpm_key,
        lock=not incoming or inherited is not None,
        uuid=arguments.uuid,
    )


def _daemon_options(
    arguments: argparse.Namespace,
    sockets: Mapping[str, int],
    swtpm_key: SwtpmKey | None,
    inherited: Inheritance | None,
) -> DaemonOptions:
    endpoints = _endpoints(arguments, sockets, inherited)
    if arguments.fd_store and inherited is None and not os.environ.get("NOTIFY_SOCKET"):
        raise UsageError("--fd-store: no service manager listens", "start crbd from a unit with Type=notify")
    return DaemonOptions(
        ctrl=endpoints.get("ctrl"),
        data=endpoints.get("data"),
        registers=endpoints.get("registers"),
        instance=_instance_options(arguments, endpoints, swtpm_key, inherited),
        pid_file=arguments.pid,
        # A terminal that is closed hangs up on what was started from it; that one is not to live on without it.
        upgrade_at_hangup=not sys.stderr.isatty(),
        supervised=True,
        fd_store=arguments.fd_store,
    )


def _endpoints(
    arguments: argparse.Namespace, sockets: Mapping[str, int], inherited: Inheritance | None
) -> dict[str, Endpoint]:
    """Where each channel is served: as its option says, or else on the socket that a socket unit has for it.

    Raises UsageError.
    """
    endpoints: dict[str, Endpoint] = {}
    for name, option in (("ctrl", arguments.ctrl), ("data", arguments.data)):
        if option is not None:
            endpoints[name] = parse_endpoint(option, f"--{name}")
    if arguments.registers is not None:
        endpoints["registers"] = _parse_registers(arguments.registers)
    for name, endpoint in endpoints.items():
        if name in sockets:
            raise UsageError(f"--{name} is given, and a socket unit has a socket for it too", "leave one out")
        if arguments.fd_store and isinstance(endpoint, DescriptorEndpoint):
            raise UsageError(f"--{name} {endpoint}: after a restart that descriptor is another", "leave --fd-store out")
    endpoints |= {name: DescriptorEndpoint(number) for name, number in sockets.items()}
    if inherited is not None:
        passed_on, descriptors = inherited.handover.listeners.keys() - endpoints, inherited.handover.descriptors
        endpoints |= {name: DescriptorEndpoint(descriptors.get(f"listener.{name}", -1)) for name in passed_on}
    if not endpoints:
        raise UsageError("there is no socket to serve", "give --ctrl, --data or both, or --registers")
    return endpoints


def _parse_registers(text: str) -> Endpoint:
    """Parse the value of --registers. Raises UsageError."""
    protocol, _, where = text.partition(":")
    if protocol != "vfio-user" or not where:
        raise UsageError(f"--registers {text!r} is no register endpoint", "use vfio-user:PATH[,mode=0660]")
    return parse_endpoint(f"unix:{where}", "--registers")


def _instance_options(
    arguments: argparse.Namespace,
    endpoints: Container[str],
    swtpm_key: SwtpmKey | None,
    inherited: Inheritance | None,
) -> InstanceOptions:
    flags = _settings(arguments.flags, "--flags", FLAGS)
    locality = _settings(arguments.locality, "--locality", LOCALITY_SETTINGS)
    startups = {name for name in flags if name.startswith("startup-")}
    if len(startups) > 1:
        raise UsageError(f"--flags: {' and '.join(sorted(startups))} exclude each other", "give one of them")
    startup = Startup.NEED_INIT
    if "startup-clear" in flags:
        startup = Startup.CLEAR
    elif "startup-state" in flags:
        startup = Startup.STATE
    elif flags & {"not-need-init", "startup-none"} or ("registers" in endpoints and "ctrl" not in endpoints):
        # Over vfio-user nobody says INIT: a guest finds the TPM switched on.
        startup = Startup.POWER_ON
    migration, migration_key = _migration(arguments), arguments.migration_key
    if "incoming" in migration and startup is not Startup.NEED_INIT:
        raise UsageError("--migration incoming waits for INIT, --flags powers on at once", "give one of them")
    if migration and "registers" in endpoints:
        raise UsageError("--migration is for --ctrl: no VMM migrates a device of --registers", "leave one out")
    return InstanceOptions(
        startup=startup,
        serves_registers="registers" in endpoints,
        may_manufacture=arguments.create or arguments.ephemeral,
        auto_shutdown="disable-auto-shutdown" not in flags,
        reject_locality_4="reject-locality-4" in locality,
        allow_set_locality="allow-set-locality" in locality,
        file_key=swtpm_key,
        migration_key=_swtpm_key(migration_key, "--migration-key", inherited, "migration"),
        incoming="incoming" in migration,
        release_lock_outgoing="release-lock-outgoing" in migration,
        checkpoint=_checkpoint(arguments.checkpoint),
    )


def _checkpoint(when: str) -> CheckpointPolicy:
    """Raises UsageError."""
    if when in ("never", "every-command"):
        return CheckpointPolicy(every_command=when == "every-command")
    try:
        seconds = float(when)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_PAUSE <= seconds <= LONGEST_PAUSE:
        raise UsageError(
            f"--checkpoint: {when!r} is no time",
            f"it takes never, every-command, or seconds from {SHORTEST_PAUSE:g} to {LONGEST_PAUSE}",
        )
    return CheckpointPolicy(when_idle=seconds)


def _refuse_checkpoints_elsewhere(options: InstanceOptions, store: Store) -> None:
    """Raises UsageError; the store is closed then."""
    if options.checkpoint != CheckpointPolicy() and not store.keeps_checkpoints:
        store.close()
        raise UsageError(
            f"--checkpoint needs state in crbd's own layout, and {store.name} is in swtpm's",
            "convert it (crbd state convert --to crbd), or leave --checkpoint out",
        )


def _migration(arguments: argparse.Namespace) -> set[str]:
    return _settings(arguments.migration, "--migration", MIGRATION_SETTINGS)


def _settings(text: str, option: str, known: Mapping[str, str]) -> set[str]:
    """The names in a comma-separated list. Raises UsageError for one that is not known."""
    names = {name for name in text.split(",") if name}
    for name in sorted(names - known.keys()):
        raise UsageError(f"{option}: there is no {name!r}", f"it takes {', '.join(known)}")
    return names


def _make_engine(port: StatePort, library: str | None) -> Engine:
    return LibtpmsEngine(port, library)
