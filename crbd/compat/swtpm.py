"""`swtpm`: crbd behind swtpm's command line, doing what swtpm 0.11 does in swtpm's order.

Absent state is made, as swtpm's callers expect; state that exists and cannot be read ends the start. Every failure is
exit status 1, with the reason on stderr and in the log, if there is one. docs/swtpm-compat.md tells what differs.
"""

from __future__ import annotations

import logging
import os
import stat
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from crbd.compat.swtpm_endpoints import endpoints_of
from crbd.compat.swtpm_grammar import GetoptError, Values
from crbd.compat.swtpm_keys import read_key
from crbd.compat.swtpm_log import DEFAULT_PREFIX, start_log
from crbd.compat.swtpm_options import CommandLine, HelpWantedError, parse
from crbd.compat.swtpm_pcap import PcapFile, RecordedLibtpms, open_pcap
from crbd.compat.swtpm_printing import INFO_PROFILES, VERSION, capabilities_json, socket_usage, spare_engine, usage
from crbd.compat.swtpm_profile import profile_of
from crbd.compat.swtpm_state import StatePlace, open_place, place_of, states_json
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.errors import EndpointError, EngineError, OperatorError, PidFileError, StoreError, UsageError
from crbd.server.options import DaemonOptions
from crbd.server.premises import Premises
from crbd.server.process import Background, become, change_root, find_user
from crbd.server.seccomp import Action
from crbd.server.succession import Inheritance, Program, inheritance, is_successor, keep_signals, rehearse
from crbd.server.walls import Walls, Wanted, forbid_core_dumps
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.memory import MemoryStore
from crbd.store.port import Store
from crbd.systemd.notify import notify

log = logging.getLogger(__name__)

_LIBTPMS_LEVEL = 5
"""The first level of `--log` at which libtpms traces."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status, 0 or 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    program = sys.argv[0]
    match arguments[:1]:
        case []:
            print("Missing TPM interface type.", file=sys.stderr)
            return 1
        case ["socket"]:
            return _socket(program, arguments[1:])
        case ["-h" | "--help"]:
            print(usage(program), end="")
        case ["-v" | "--version"]:
            print(VERSION)
        case other:
            print(f"Unsupported TPM interface type '{other[0]}'.\n{usage(program)}", end="", file=sys.stderr)
            return 1
    return 0


def _socket(program: str, arguments: Sequence[str]) -> int:
    reporter = _Reporter()
    try:
        line = parse(arguments)
        return _run(line, reporter)
    except HelpWantedError:
        print(socket_usage(program), end="")
        return 0
    except GetoptError as error:
        print(f"{error}\n{socket_usage(program)}", end="", file=sys.stderr)
    except (OperatorError, StoreError, EngineError) as error:
        reporter.report(error)
    return 1


class _Reporter:
    """Says why the start failed, where its operator looks."""

    def __init__(self) -> None:
        self.has_log = False

    def report(self, error: OperatorError | StoreError | EngineError) -> None:
        for text in (*_as_swtpm_says(error), str(error)):
            print(f"{DEFAULT_PREFIX}{text}", file=sys.stderr)
            if self.has_log:
                log.error("%s", text)


def _as_swtpm_says(error: Exception) -> tuple[str, ...]:
    """The line that callers of swtpm know, which goes before the one that names the thing and the remedy."""
    reason = error.__cause__.strerror if isinstance(error.__cause__, OSError) else None
    if isinstance(error, EndpointError) and reason is not None:
        return (f"Could not open {'UnixIO' if ' unix:' in error.what else 'TCP'} socket: {reason}",)
    if isinstance(error, PidFileError) and reason is not None:
        path = error.what.removeprefix("--pid ").removesuffix(f": {reason}")
        return (f"Could not open pidfile {path} : {reason}",)
    return ()


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be served, and how."""

    daemon: DaemonOptions
    walls: Walls
    place: StatePlace | None
    profile: str | None
    log_descriptor: int | None
    log_level: int
    pcap: PcapFile | None

    def make_engine(self, port: StatePort) -> Engine:
        """libtpms, with its messages in the log from level 5 on."""
        level = max(0, self.log_level - _LIBTPMS_LEVEL + 1)
        descriptor = 2 if self.log_descriptor is None and level else self.log_descriptor
        if self.pcap is None:
            engine = LibtpmsEngine(port, debug_fd=descriptor, debug_level=level)
        else:
            engine = RecordedLibtpms(port, self.pcap, debug_fd=descriptor, debug_level=level)
        if self.profile is not None:
            try:
                engine.set_profile(self.profile)
            except EngineError:
                engine.close()
                raise UsageError("--profile: libtpms does not take it", "see --print-profiles") from None
        return engine


def _run(line: CommandLine, reporter: _Reporter) -> int:
    forbid_core_dumps()
    if is_successor():
        _serving()  # clients wait from the next line on
    program, inherited = _program(line), inheritance()
    user = find_user(line.texts["--runas"]) if "--runas" in line.texts and inherited is None else None
    background = Background() if line.daemon and inherited is None else None
    if "--chroot" in line.texts:
        _serving()
        # libtpms, and what it opens, is out of reach afterwards.
        spare_engine().close()
        change_root(Path(line.texts["--chroot"]))
    if user is not None:
        become(user)
    log_values = line.values("--log")
    log_descriptor = start_log(log_values, anew=inherited is None)
    reporter.has_log = log_descriptor is not None
    if line.print_capabilities:
        print(capabilities_json())
        return 0
    if not line.tpm2:
        raise UsageError("Error: TPM 1.2 is not supported by libtpms.")
    if line.print_states:
        endpoints_of(line, os.environ)
        print(_states(line), end="")
        return 0
    if line.print_profiles:
        endpoints_of(line, os.environ)
        print(_profiles(), end="")
        return 0
    level = 0 if log_values is None else log_values.number("level") or 0
    plan = _plan(line, log_descriptor, level, inherited, program)
    try:
        if line.print_info:
            print(_info(plan, line.print_info))
        elif inherited is not None and inherited.trial:
            rehearse(inherited, plan.daemon.instance, plan.make_engine)
        else:
            _serve(plan, background, inherited)
    finally:
        if plan.pcap is not None:
            plan.pcap.close()
    return 0


def _program(line: CommandLine) -> Program | None:
    """What an upgrade executes: not from within another root directory, where it is not, nor in the midst of a pcap
    file, which would begin anew.
    """
    return None if line.texts.keys() & {"--chroot", "--pcap"} else Program.of_this_process()


def _key(values: Values | None, inherited: Inheritance | None, name: str) -> SwtpmKey | None:
    """From the process before this one where there was one: a pipe or a removed file cannot be read again."""
    if values is None:
        return None
    return read_key(values) if inherited is None else inherited.swtpm_key(name)


def _plan(
    line: CommandLine,
    log_descriptor: int | None,
    log_level: int,
    inherited: Inheritance | None,
    program: Program | None,
) -> _Plan:
    """Every option that is left, in swtpm's order. Raises UsageError."""
    endpoints = endpoints_of(line, os.environ)
    key = _key(line.values("--key"), inherited, "file")
    migration_key = _key(line.values("--migration-key"), inherited, "migration")
    pid_file = _pid_file(line) if inherited is None else None
    locality = line.values("--locality")
    place = place_of(line.values("--tpmstate"), os.environ)
    action = _filter(line)
    startup = _startup(line)
    flags = line.values("--flags")
    migration = line.values("--migration")
    instance = InstanceOptions(
        startup=startup,
        may_manufacture=True,
        auto_shutdown=flags is None or not flags.flag("disable-auto-shutdown"),
        reject_locality_4=locality is not None and locality.flag("reject-locality-4"),
        allow_set_locality=locality is not None and locality.flag("allow-set-locality"),
        file_key=key,
        migration_key=migration_key,
        incoming=migration is not None and migration.flag("incoming"),
        release_lock_outgoing=migration is not None and migration.flag("release-lock-outgoing"),
    )
    daemon = DaemonOptions(
        ctrl=endpoints.ctrl,
        data=endpoints.data,
        instance=instance,
        pid_file=pid_file,
        disconnect=endpoints.disconnect,
        end_with_data_client=endpoints.end_with_data_client,
        end_with_ctrl_client=endpoints.end_with_ctrl_client,
        upgrade_at_hangup=False,
    )
    profile, pcap = line.values("--profile"), line.values("--pcap")
    return _Plan(
        daemon=daemon,
        # swtpm knows nothing of Landlock, and neither do the places that its callers' files lie in.
        walls=Walls(action, line.values("--seccomp") is not None, Wanted.OFF, (), program),
        place=place,
        profile=None if profile is None else profile_of(profile),
        log_descriptor=log_descriptor,
        log_level=log_level,
        pcap=None if pcap is None else open_pcap(pcap),
    )


def _pid_file(line: CommandLine) -> Path | int | None:
    values = line.values("--pid")
    if values is None:
        return None
    path, number = values.string("file"), values.descriptor("fd")
    if path is None and number is None:
        raise UsageError("The file or fd parameter is required for the pid option.")
    if path is not None:
        return Path(path)
    try:
        usable = number is not None and stat.S_ISREG(os.fstat(number).st_mode)
    except OSError:
        usable = False
    if not usable:
        raise UsageError(f"Bad filedescriptor {number} for pid file")
    return number


def _filter(line: CommandLine) -> Action:
    """What becomes of system calls that are not needed; swtpm filters unasked. Raises UsageError."""
    seccomp = line.values("--seccomp")
    action = "kill" if seccomp is None else seccomp.string("action") or "kill"
    if action not in {each.value for each in Action}:
        raise UsageError(f"Unsupported seccomp log action {action}")
    return Action(action)


def _startup(line: CommandLine) -> Startup:
    flags = line.values("--flags")
    if flags is None:
        return Startup.NEED_INIT
    if flags.flag("startup-clear"):
        return Startup.CLEAR
    if flags.flag("startup-state"):
        return Startup.STATE
    if flags.flag("startup-deactivated"):
        raise UsageError("TPM 2 does not support startup deactivated.")
    return Startup.POWER_ON if flags.flag("not-need-init") else Startup.NEED_INIT


def _states(line: CommandLine) -> str:
    place = place_of(line.values("--tpmstate"), os.environ)
    if place is None or "--tpmstate" not in line.texts:
        raise UsageError("Error: --tpmstate option is required for --print-states")
    return states_json(place)


def _profiles() -> str:
    engine = spare_engine()
    try:
        return engine.info(INFO_PROFILES) if engine.supports_profiles else ""
    finally:
        engine.close()


def _info(plan: _Plan, flags: int) -> str:
    """What libtpms says; of the TPM in the state, where a state is named, which is made if there is none."""
    if plan.place is None:
        engine = spare_engine()
        try:
            return engine.info(flags)
        finally:
            engine.close()
    store = open_place(plan.place, plan.daemon.instance.file_key, lock=True)
    try:
        there = store.load(StateKind.PERMANENT) is not None
        return _info_of(plan, _Copy(store) if there else store, flags)
    finally:
        store.close()


class _Copy(MemoryStore):
    """What a store holds, under its name: nothing that is stored is used up by a question."""

    def __init__(self, store: Store) -> None:
        super().__init__({kind: data for kind in StateKind if (data := store.load(kind)) is not None})
        self._of = store.name

    @property
    def name(self) -> str:
        return self._of


def _info_of(plan: _Plan, store: Store, flags: int) -> str:
    options = InstanceOptions(startup=Startup.POWER_ON, may_manufacture=True, auto_shutdown=False)
    instance = Instance(plan.make_engine, store, options)
    try:
        instance.check()
        instance.begin()
        return instance.info(flags)
    finally:
        instance.close()


def _serve(plan: _Plan, background: Background | None, inherited: Inheritance | None) -> None:
    if plan.daemon.ctrl is None and plan.daemon.data is None:
        raise UsageError("there is no socket to serve", "give --ctrl, --server or --port")
    if plan.place is None:
        raise UsageError("Error: nothing says where the TPM's state is", "give --tpmstate dir=DIR or set TPM_PATH")
    instance = plan.daemon.instance
    lock = inherited is not None or not instance.incoming
    store = open_place(plan.place, instance.file_key, lock=lock)

    def ready() -> None:
        if background is not None:
            background.finish()
        try:
            notify("READY=1")
        except OSError as error:
            log.warning("the service manager could not be told: %s", error.strerror)

    # libvirt gives the socket one second to appear: it is there before trio is imported. A signal is kept until then.
    keep_signals()
    with closing(Premises(plan.daemon, store, plan.make_engine, inherited)) as premises:
        _serving()(premises, plan.walls.program, ready, plan.walls.raise_all)


def _serving() -> Callable[[Premises, Program | None, Callable[[], None], Callable[[], None]], None]:
    serve: Callable[[Premises, Program | None, Callable[[], None], Callable[[], None]], None]
    serve = import_module("crbd.compat.swtpm_serving").serve_until_the_end
    return serve
