"""The filter of system calls: what it answers, and that a daemon behind it is the daemon that it was."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from struct import unpack_from

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.server import syscalls
from crbd.server.seccomp import ALLOW, ERRNO, KILL_PROCESS, LOG, MACHINES, Action, can_filter, program
from crbd.server.seccomp_calls import (
    DESCRIPTORS,
    FACTS,
    FILES,
    FORBIDDEN,
    JUDGED,
    MEMORY,
    SOCKETS,
    STARTING,
    THREADS,
    Numbers,
)

from .walled import INTRUDED, Walled, serving, swtpm

needs_filter = pytest.mark.skipif(not can_filter(), reason=f"there is no filter for {syscalls.machine()}")

FREE = {**FILES, **DESCRIPTORS, **SOCKETS, **MEMORY, **THREADS, **FACTS}
KNOWN = {**FREE, **STARTING, **JUDGED, **FORBIDDEN}
NOT_THERE = ERRNO | errno.ENOSYS
MACHINE = pytest.mark.parametrize("machine", MACHINES)


def answer(filtering: bytes, audit: int, number: int, arguments: tuple[int, ...] = ()) -> int:
    """What the kernel does with a call: the few instructions of classic BPF that there are (seccomp(2), bpf(4))."""
    data = number.to_bytes(4, "little") + audit.to_bytes(4, "little") + bytes(8)
    data += b"".join(each.to_bytes(8, "little") for each in (*arguments, *[0] * (6 - len(arguments))))
    accumulator = position = 0
    while True:
        code, yes, no, operand = unpack_from("<HBBI", filtering, 8 * position)
        position += 1
        match code:
            case 0x20:
                assert operand % 4 == 0, "the kernel takes whole words alone"
                (accumulator,) = unpack_from("<I", data, operand)
            case 0x54:
                accumulator &= operand
            case 0x15:
                position += yes if accumulator == operand else no
            case 0x35:
                position += yes if accumulator >= operand else no
            case 0x06:
                result: int = operand
                return result
            case _:
                raise AssertionError(f"instruction {code:#x}")


def judged(machine: str, name: str, *arguments: int, upgradable: bool = True) -> int:
    """The answer of the killing filter to a call by its name."""
    number = KNOWN[name][MACHINES[machine].column]
    assert number is not None
    return answer(program(machine, Action.KILL, upgradable=upgradable), MACHINES[machine].audit, number, arguments)


def numbers(calls: Numbers, machine: str) -> dict[str, int]:
    column = MACHINES[machine].column
    return {name: number for name, both in calls.items() if (number := both[column]) is not None}


@MACHINE
@pytest.mark.parametrize("upgradable", [True, False])
def test_every_call_has_its_answer(machine: str, upgradable: bool) -> None:
    filtering = program(machine, Action.KILL, upgradable=upgradable)
    wanted = dict.fromkeys(numbers(FREE, machine), ALLOW) | dict.fromkeys(numbers(FORBIDDEN, machine), KILL_PROCESS)
    wanted |= dict.fromkeys(numbers(STARTING, machine), ALLOW if upgradable else KILL_PROCESS)
    by_name = numbers(KNOWN, machine)
    audit = MACHINES[machine].audit
    assert {name: answer(filtering, audit, by_name[name]) for name in wanted} == wanted
    unknown = set(range(600)) - set(by_name.values())
    assert {answer(filtering, audit, number) for number in unknown} == {NOT_THERE}


@MACHINE
def test_another_architecture_has_no_calls(machine: str) -> None:
    filtering = program(machine, Action.KILL, upgradable=True)
    for other in {0x40000003, *(each.audit for each in MACHINES.values())} - {MACHINES[machine].audit}:
        assert answer(filtering, other, numbers(FREE, machine)["read"]) == KILL_PROCESS


def test_the_other_numbers_of_x86_64_are_no_way_round() -> None:
    filtering = program("x86_64", Action.KILL, upgradable=True)
    assert answer(filtering, MACHINES["x86_64"].audit, 0x40000000) == KILL_PROCESS
    assert answer(filtering, MACHINES["x86_64"].audit, 0x40000000 + 520) == KILL_PROCESS


@MACHINE
@given(number=st.integers(0, 0x3FFFFFFF) | st.integers(0, 600), arguments=st.tuples(*[st.integers(0, 2**64 - 1)] * 6))
def test_a_log_only_logs(machine: str, number: int, arguments: tuple[int, ...]) -> None:
    audit = MACHINES[machine].audit
    logged = answer(program(machine, Action.LOG, upgradable=False), audit, number, arguments)
    killed = answer(program(machine, Action.KILL, upgradable=False), audit, number, arguments)
    assert logged == (ALLOW if killed == ALLOW else LOG)


_FORK, _VFORK, _THREAD = 0x01200011, 0x4111, 0x3D0F00
_HIGH = 1 << 40
"""Above the 32 bits that the kernel looks at."""


@MACHINE
@pytest.mark.parametrize(
    ("name", "arguments", "wanted"),
    [
        ("socket", (1, 1, 0), ALLOW),
        ("socket", (2, 1, 0), ERRNO | errno.EAFNOSUPPORT),
        ("socket", (10, 1, 0), ERRNO | errno.EAFNOSUPPORT),
        ("socket", (16, 3, 0), ERRNO | errno.EAFNOSUPPORT),
        ("socket", (40, 1, 0), ERRNO | errno.EAFNOSUPPORT),
        ("socketpair", (1, 1, 0), ALLOW),
        ("socketpair", (30, 1, 0), ERRNO | errno.EAFNOSUPPORT),
        ("ioctl", (3, 0x5421), ALLOW),
        ("ioctl", (0, 0x5412), ERRNO | errno.ENOTTY),  # TIOCSTI: types for whoever sits at the terminal
        ("prctl", (15,), ALLOW),
        ("prctl", (4, 0), ALLOW),
        ("prctl", (4, 1), ERRNO | errno.EINVAL),
        ("prctl", (22, 2), ERRNO | errno.EINVAL),
        ("prctl", (0x59616D61, 2**64 - 1), ERRNO | errno.EINVAL),  # PR_SET_PTRACER, anybody
        ("prlimit64", (0, 7, 0, 0x7FFF0000), ALLOW),
        ("prlimit64", (0, 7, 0x7FFF0000, 0), ERRNO | errno.EPERM),
        ("prlimit64", (0, 7, _HIGH, 0), ERRNO | errno.EPERM),
        ("mmap", (0, 4096, 3, 0x22), ALLOW),
        ("mmap", (0, 4096, 5, 0x02), ALLOW),
        ("mmap", (0, 4096, 7, 0x22), ERRNO | errno.EPERM),
        ("mprotect", (0x1000, 4096, 1), ALLOW),
        ("mprotect", (0x1000, 4096, 5), ERRNO | errno.EPERM),
        ("clone3", (0x1000, 88), NOT_THERE),
        ("clone", (_THREAD,), ALLOW),
        ("clone", (_FORK,), ALLOW),
        ("clone", (_VFORK,), ALLOW),
        ("clone", (_FORK | 0x10000000,), KILL_PROCESS),
        ("clone", (_THREAD | 0x40000000,), KILL_PROCESS),
    ],
)
def test_calls_that_are_judged_by_their_arguments(
    machine: str, name: str, arguments: tuple[int, ...], wanted: int
) -> None:
    assert judged(machine, name, *arguments) == wanted


@MACHINE
@pytest.mark.parametrize(("flags", "wanted"), [(_THREAD, ALLOW), (_FORK, KILL_PROCESS), (_VFORK, KILL_PROCESS)])
def test_without_upgrade_threads_alone_are_made(machine: str, flags: int, wanted: int) -> None:
    assert judged(machine, "clone", flags, upgradable=False) == wanted


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")),
        ("aarch64", Path("/usr/include/asm-generic/unistd.h")),
    ],
)
def test_numbers_are_the_kernels(machine: str, header: Path) -> None:
    if not header.exists():
        pytest.skip(f"{header} is not there: install linux-libc-dev")
    text = header.read_text()
    theirs = {name: int(number) for name, number in re.findall(r"^#define __NR(?:3264)?_(\w+)\s+(\d+)$", text, re.M)}
    ours = {name: number for name, number in numbers(KNOWN, machine).items() if name in theirs}
    assert ours == {name: theirs[name] for name in ours}
    # The header of Debian 12 has no call that is newer than Linux 6.1; and calls it by other names on 32 and 64 bits.
    assert set(numbers(KNOWN, machine)) - set(theirs) <= {"fchmodat2", "newfstatat"}


_PROBE = """
import ctypes, os, sys
from crbd.server import syscalls
from crbd.server.seccomp import Action, install

libc = ctypes.CDLL(None)
upgradable = sys.argv[1] == "upgradable"
for number in map(int, sys.argv[2:]):
    child = os.fork()
    if not child:
        syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
        syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
        install(Action.KILL, upgradable=upgradable)
        libc.syscall(number, -1, 0, 0, 0, 0, 0)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@needs_filter
@pytest.mark.parametrize("upgradable", [True, False])
def test_the_kernel_kills_whoever_tries_what_is_forbidden(upgradable: bool) -> None:
    """Each call in a process of its own, for real."""
    calls = FORBIDDEN if upgradable else {**FORBIDDEN, **STARTING}
    wanted = numbers(calls, syscalls.machine())
    ended = subprocess.run(
        [sys.executable, "-c", _PROBE, "upgradable" if upgradable else "final", *map(str, wanted.values())],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    statuses = dict(zip(wanted, map(int, ended.stdout.split()), strict=True))
    assert statuses == dict.fromkeys(wanted, -signal.SIGSYS)


_THREAD_PROBE = """
import ctypes, threading
from crbd.server import syscalls
from crbd.server.seccomp import Action, install

filtered = threading.Event()
def intrude():
    filtered.wait()
    ctypes.CDLL(None).ptrace(16, 1, 0, 0)
intruder = threading.Thread(target=intrude)
intruder.start()
syscalls.prctl(syscalls.PR_SET_NO_NEW_PRIVS, 1)
syscalls.prctl(syscalls.PR_SET_DUMPABLE, 0)
install(Action.KILL, upgradable=True)
filtered.set()
intruder.join()
"""


@needs_filter
def test_threads_that_were_there_before_are_filtered_as_well() -> None:
    ended = subprocess.run([sys.executable, "-c", _THREAD_PROBE], check=False, timeout=60)
    assert ended.returncode == -signal.SIGSYS


def call(name: str, *arguments: int) -> str:
    """An attempt."""
    return " ".join(("call", str(numbers(KNOWN, syscalls.machine())[name]), *map(str, arguments)))


def is_killed(daemon: Walled, text: str) -> bool:
    """Whether the attempt is the daemon's end."""
    return daemon.attempt(text) == "dead" and daemon.process.wait(20) == -signal.SIGSYS


@needs_filter
def test_an_intruder_in_the_daemon_is_killed_and_the_state_is_whole(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        assert set(daemon.status("Seccomp")) == {"2"}, "every thread is filtered"
        assert set(daemon.status("NoNewPrivs")) == {"1"}
        assert len(daemon.status("Seccomp")) > 1, "there is a thread that runs TPM commands"
        assert daemon.attempt(call("socket", 2, 1, 0)) == "EAFNOSUPPORT"
        assert is_killed(daemon, call("ptrace", 16, 1))
    with serving(tmp_path) as daemon:
        assert is_killed(daemon, call("process_vm_readv", 1))


@needs_filter
def test_walls_stay_with_the_new_program_and_are_not_stacked(tmp_path: Path) -> None:
    with serving(tmp_path) as daemon:
        for _ in range(2):
            done, said = daemon.upgrade()
            assert done, said
            assert daemon.attempt(call("prctl", 3)) == "done 0", "core dumps are off again"
            assert set(daemon.status("Seccomp_filters")) == {"1"}
        assert is_killed(daemon, call("mount", 0))


@needs_filter
def test_without_upgrade_no_program_is_started(tmp_path: Path) -> None:
    with serving(tmp_path, "--no-upgrade", state=False) as daemon:
        done, said = daemon.upgrade()
        assert not done
        assert "--no-upgrade" in said
        assert is_killed(daemon, "execute /bin/true")


@needs_filter
def test_with_upgrade_what_is_started_is_behind_the_same_filter(tmp_path: Path) -> None:
    with serving(tmp_path, "--landlock", "off", state=False) as daemon:
        assert daemon.attempt("execute /bin/true") == "done 0"
        probe = "import os; os.setuid(0)"
        (tmp_path / "probe.py").write_text(probe)
        assert daemon.attempt(f"execute {sys.executable} {tmp_path / 'probe.py'}") == f"done {-signal.SIGSYS}"


@needs_filter
@pytest.mark.slow
def test_a_log_or_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "--seccomp", "log", state=False) as daemon:
        assert set(daemon.status("Seccomp")) == {"2"}
        assert daemon.attempt(call("setuid", -1)) == "EINVAL", "the kernel did the call"
    with serving(tmp_path, "--seccomp", "none", state=False) as daemon:
        assert set(daemon.status("Seccomp")) == {"0"}
        assert set(daemon.status("NoNewPrivs")) == {"1"}


@needs_filter
@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ((), "2"),
        pytest.param(("--seccomp", "action=kill"), "2", marks=pytest.mark.slow),
        pytest.param(("--seccomp", "action=log"), "2", marks=pytest.mark.slow),
        pytest.param(("--seccomp", "action=none"), "0", marks=pytest.mark.slow),
    ],
)
def test_the_swtpm_command(tmp_path: Path, options: tuple[str, ...], mode: str) -> None:
    with swtpm(tmp_path, *options) as daemon:
        assert set(daemon.status("Seccomp")) == {mode}
        if options in ((), ("--seccomp", "action=kill")):
            assert is_killed(daemon, call("ptrace", 16, 1))
        else:
            assert daemon.attempt(call("ptrace", 16, 2**22 + 1)) == "ESRCH"


@pytest.mark.parametrize("command", [serving, pytest.param(swtpm, marks=pytest.mark.slow)])
def test_no_core_dumps(tmp_path: Path, command: Callable[[Path], AbstractContextManager[Walled]]) -> None:
    with command(tmp_path) as daemon:
        limits = Path("/proc", str(daemon.process.pid), "limits").read_text()
        assert re.search(r"^Max core file size\s+0\s+0", limits, re.M)
        assert daemon.attempt(call("prctl", 3)) == "done 0", "PR_GET_DUMPABLE"


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_no_debugger_of_the_same_user() -> None:
    become = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with tempfile.TemporaryDirectory(prefix="crbd-walls-") as directory:
        place = Path(directory)
        os.chown(place, 65534, 65534)
        with serving(place, state=False, program=(*become, *INTRUDED)) as daemon:
            for name in ("mem", "maps", "environ"):
                looking = [*become, "cat", f"/proc/{daemon.process.pid}/{name}"]
                looked = subprocess.run(looking, capture_output=True, text=True, check=False)
                assert "Permission denied" in looked.stderr, name
