"""libvirt as it runs on a host, without the host's services, with crbd's commands in swtpm's place.

A libvirtd is started by hand, as root, in mount, process and network namespaces of its own. Its directories and that of
swtpm_localca lie in a temporary directory; the rest of the host is as it is, swtpm's configuration in /etc included.
libvirtd daemonizes what it starts, so process 1 of its namespace must be one that reaps, as a shell does.
It finds neither D-Bus nor a /dev/kvm that it may use: where KVM is there but does not work, libvirt asks QEMU again for
every command what it can do.

QEMU runs as libvirt-qemu and the TPM as tss, as on Debian. tss must reach Python and crbd: directories above these that
are closed to others (/root, say) are covered in the namespace by empty ones that are open.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import crbd
from crbd.cli.compat_path import find_directory

from .console import Console
from .daemon import dies_with_us
from .qemu import GuestImage
from .shell import Shell
from .waiting import Deadline, DeadlineError

BOOT_SECONDS = 60.0
"""The deadline for power-on to shell: several times what it takes."""
COMMAND_SECONDS = 60.0
"""The deadline for what virsh is told."""
_TOO_SLOW = "swtpm socket did not show up"
_PLACES = {
    "etc": "/etc/libvirt",
    "lib": "/var/lib/libvirt",
    "cache": "/var/cache/libvirt",
    "log": "/var/log/libvirt",
    "log-swtpm": "/var/log/swtpm",
    "run": "/run/libvirt",
    "authority": "/var/lib/swtpm-localca",
}
"""Directories in the temporary one, and where libvirtd and its children find them."""
_QEMU_CONFIGURATION = """
security_driver = "none"
stdio_handler = "file"
cgroup_controllers = []
namespaces = []
"""
_LIBVIRTD_CONFIGURATION = """
auth_unix_ro = "none"
auth_unix_rw = "none"
unix_sock_dir = "{root}/sock"
host_uuid = "{uuid}"
log_outputs = "1:file:{root}/libvirtd.log"
log_filters = "1:util.command 3:util 3:cpu 3:access 3:node_device 3:rpc 3:event 3:conf 3:qemu 3:security"
"""
_START = """
setpriv --reuid=tss --regid=tss --clear-groups swtpm_setup --print-capabilities >/dev/null
libvirtd --config /etc/libvirt/libvirtd.conf --pid-file /run/libvirt/libvirtd.pid &
wait $!
"""
_DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>512</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{root}/vmlinuz</kernel>
    <initrd>{root}/initrd</initrd>
    <cmdline>console=ttyS0,115200 quiet</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <serial type='unix'><source mode='connect' path='{console}'/></serial>
    <memballoon model='none'/>
    <tpm model='tpm-crb'>
      <backend type='emulator' version='2.0'>{backend}</backend>
    </tpm>
  </devices>
</domain>
"""


@dataclass(frozen=True, slots=True)
class TpmProcess:
    """The TPM of a domain, as the processes outside libvirtd's namespace see it."""

    number: int
    user: int
    command: Sequence[str]

    def await_end(self, seconds: float = 10) -> None:
        """DeadlineError if it has not ended then."""
        try:
            descriptor = os.pidfd_open(self.number)
        except ProcessLookupError:
            return
        try:
            ended, _, _ = select.select([descriptor], [], [], seconds)
        finally:
            os.close(descriptor)
        if not ended:
            raise DeadlineError(f"the TPM still runs after {seconds} s: {self.command}")


@dataclass(frozen=True, slots=True)
class Libvirt:
    """A running libvirtd."""

    root: Path

    @property
    def authority(self) -> Path:
        """swtpm_localca's directory."""
        return self.root / "authority"

    @property
    def uri(self) -> str:
        """How clients, and another libvirtd, reach it."""
        return f"qemu+unix:///system?socket={self.root}/sock/libvirt-sock"

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """virsh, whatever becomes of it.

        On a busy machine a TPM may need longer to its socket than the second that libvirt gives it (docs/libvirt.md).
        Time is not what is tested, so libvirt is told again then.
        """
        deadline = Deadline(COMMAND_SECONDS)
        while True:
            done = subprocess.run(
                ["virsh", "--quiet", "--connect", self.uri, *arguments],
                check=False,
                capture_output=True,
                text=True,
                timeout=COMMAND_SECONDS,
                env={"PATH": os.environ["PATH"], "LC_ALL": "C"},
            )
            if _TOO_SLOW not in done.stderr or deadline.passed:
                return done

    def virsh(self, *arguments: str) -> str:
        """What virsh prints of a command that must succeed."""
        done = self.attempt(*arguments)
        assert done.returncode == 0, f"virsh {shlex.join(arguments)}: {done.stderr}\n{self._said()}"
        return done.stdout.strip()

    def refusal(self, *arguments: str) -> str:
        """Why virsh does not do what it must not do."""
        done = self.attempt(*arguments)
        assert done.returncode != 0, f"virsh {shlex.join(arguments)}: {done.stdout}"
        return done.stderr.strip()

    def ran(self, command: str) -> bool:
        """Whether libvirtd has run a command that begins so, in one of crbd's directory."""
        return f"About to run {find_directory()}/{command}" in (self.root / "libvirtd.log").read_text()

    def log_of_tpm(self, domain: str) -> str:
        """What the TPM of a domain said."""
        return (self.root / "log-swtpm" / "libvirt" / "qemu" / f"{domain}-swtpm.log").read_text()

    def remove(self, domain: str) -> None:
        """Leave nothing of a domain."""
        # Each is refused where it is not needed.
        self.attempt("destroy", domain)
        self.attempt("undefine", domain, "--managed-save", "--tpm")

    def _said(self) -> str:
        """The ends of the logs that were written to last: libvirtd's, QEMU's, the TPM's."""
        logs = sorted(self.root.glob("**/*.log"), key=lambda log: log.stat().st_mtime)[-3:]
        return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


class Domain:
    """A domain of the test guest with a TPM. Made by `domain`."""

    def __init__(self, libvirt: Libvirt, name: str, listener: socket.socket, lines: ExitStack) -> None:
        self.libvirt = libvirt
        self.name = name
        self.uuid = str(uuid.uuid4())
        self._listener = listener
        self._lines = lines

    @property
    def state(self) -> Path:
        """The directory of the TPM's state."""
        return self.libvirt.root / "lib" / "swtpm" / self.uuid / "tpm2"

    @property
    def permanent(self) -> Path:
        """The file with the TPM's permanent state."""
        return self.state / "tpm2-00.permall"

    def define(self, backend: str = "") -> None:
        """Define the domain anew; `backend` is what the backend element of its TPM holds."""
        root = self.libvirt.root
        console = self._listener.getsockname()
        description = root / f"{self.name}.xml"
        description.write_text(
            _DOMAIN.format(name=self.name, uuid=self.uuid, root=root, console=console, backend=backend)
        )
        self.libvirt.virsh("define", str(description))

    def boot(self) -> Shell:
        """Start the domain, and wait for the guest's shell."""
        shell = self.start()
        shell.await_boot(BOOT_SECONDS)
        return shell

    def start(self) -> Shell:
        """Start the domain; the shell of a guest that boots, or goes on from a managed save."""
        self.libvirt.virsh("start", self.name)
        return self.shell()

    def shell(self) -> Shell:
        """The shell in the QEMU that was started last."""
        self._listener.settimeout(10)
        line, _ = self._listener.accept()
        return Shell(Console(self._lines.enter_context(line)))

    def migration(self, destination: Libvirt) -> list[str]:
        """virsh's command that moves the domain, which is halted meanwhile: under TCG QEMU may miss what a guest writes
        while it copies."""
        arrival = f"unix://{destination.root}/arrivals/{self.name}"
        options = ["--persistent", "--undefinesource", "--migrateuri", arrival]
        return ["migrate", *options, self.name, destination.uri]

    def at(self, libvirt: Libvirt) -> Domain:
        """This domain, where it has moved."""
        moved = Domain(libvirt, self.name, self._listener, self._lines)
        moved.uuid = self.uuid
        return moved

    def cut_console(self) -> None:
        """Let no QEMU connect any more."""
        self._listener.close()

    def destroy(self) -> None:
        """Pull the plug, and wait for the TPM's end."""
        process = self.tpm()
        self.libvirt.virsh("destroy", self.name)
        process.await_end()

    def running_tpms(self) -> list[TpmProcess]:
        """The processes that serve this domain's TPM."""
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                command = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
                user = directory.stat().st_uid
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended
            if "--tpmstate" in command and any(f"/{self.uuid}/" in argument for argument in command):
                found.append(TpmProcess(int(directory.name), user, command))
        return found

    def tpm(self) -> TpmProcess:
        """The one process that serves this domain's TPM."""
        (process,) = self.running_tpms()
        return process


@contextmanager
def domain(libvirt: Libvirt, name: str) -> Iterator[Domain]:
    """A domain that is not yet defined. In the end nothing is left of it."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        console = libvirt.root / f"{name}.console"
        listener.bind(str(console))
        stack.callback(console.unlink)
        console.chmod(0o666)
        listener.listen()
        try:
            yield Domain(libvirt, name, listener, stack)
        finally:
            libvirt.remove(name)


def _closed_to_others(path: Path) -> Path | None:
    """The topmost directory above `path` that others cannot go through."""
    for directory in reversed(path.parents):
        if not directory.stat().st_mode & 0o001:
            return directory
    return None


def _opening(root: Path) -> list[str]:
    """Shell lines that let others reach Python and crbd."""
    wanted = {Path(crbd.__file__).parent.parent, Path(sys.prefix), Path(sys.base_prefix), find_directory()}
    wanted = {path.resolve() for path in wanted}
    wanted = {path for path in wanted if not any(above in wanted for above in path.parents)}
    closed = {path: directory for path in sorted(wanted) if (directory := _closed_to_others(path))}
    lines = []
    for number, path in enumerate(closed):
        aside = root / f"aside{number}"
        lines.append(f"mkdir {aside}; mount --bind {shlex.quote(str(path))} {aside}")
    lines += [f"mount -t tmpfs -o mode=0755 none {shlex.quote(str(directory))}" for directory in set(closed.values())]
    for number, path in enumerate(closed):
        place = shlex.quote(str(path))
        lines.append(f"mkdir -p {place}; mount --bind {root}/aside{number} {place}")
    return lines


def _with_line(source: Path, line: str) -> str:
    """A file of users or groups in which one of that name is, as it was or as `line` says."""
    text = source.read_text()
    name = line.partition(":")[0]
    return text if any(each.startswith(f"{name}:") for each in text.splitlines()) else f"{text}{line}\n"


def _furnish(root: Path, image: GuestImage) -> str:
    """Fill the temporary directory; return the script that starts libvirtd on it."""
    root.chmod(0o755)
    for name in (*_PLACES, "sock", "arrivals"):
        (root / name).mkdir()
    # QEMU makes a socket there.
    (root / "arrivals").chmod(0o777)
    shutil.chown(root / "authority", "tss", "root")
    (root / "authority").chmod(0o750)
    (root / "etc" / "qemu.conf").write_text(_QEMU_CONFIGURATION)
    (root / "etc" / "libvirtd.conf").write_text(_LIBVIRTD_CONFIGURATION.format(root=root, uuid=uuid.uuid4()))
    # libvirt makes them QEMU's own for as long as it runs.
    shutil.copyfile(image.kernel, root / "vmlinuz")
    shutil.copyfile(image.initrd, root / "initrd")
    # Debian's package of libvirt's services makes this user.
    user, group = "libvirt-qemu:x:64055:64055::/var/lib/libvirt:/usr/sbin/nologin", "libvirt-qemu:x:64055:"
    mounts = {root / name: place for name, place in _PLACES.items()}
    for file, line in (("passwd", user), ("group", group)):
        (root / file).write_text(_with_line(Path("/etc", file), line))
        mounts[root / file] = f"/etc/{file}"
    if Path("/dev/kvm").exists():
        (root / "kvm").touch(mode=0)
        mounts[root / "kvm"] = "/dev/kvm"
    lines = ["set -e", "umask 022", "mount --make-rprivate /", *(f"mkdir -p {place}" for place in _PLACES.values())]
    lines += [f"mount --bind {source} {place}" for source, place in mounts.items()]
    return "\n".join([*lines, *_opening(root), _START])


def _await_service(process: subprocess.Popen[bytes], root: Path) -> None:
    deadline = Deadline(60)
    path, said = root / "sock" / "libvirt-sock", root / "said"
    while True:
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(str(path))
            except (FileNotFoundError, ConnectionRefusedError) as error:
                reason = error
            else:
                return
        if deadline.passed:
            raise DeadlineError(f"libvirtd does not accept connections: {reason}\n{said.read_text()}")
        try:
            # The pause between two tries is spent watching for its death.
            status = process.wait(timeout=0.05)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"libvirtd ended with status {status}:\n{said.read_text()}")


@contextmanager
def libvirtd(image: GuestImage) -> Iterator[Libvirt]:
    """A libvirtd that runs; it and all that it started are killed in the end."""
    with tempfile.TemporaryDirectory(prefix="crbd-libvirt-", dir="/var/tmp") as directory:
        root = Path(directory)
        script = _furnish(root, image)
        environment = {
            "PATH": f"{find_directory()}:/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C",
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nonexistent",
            "CRBD_PYTHON": sys.executable,
        }
        # Where process 1 of a namespace ends, so do all others of it; unshare takes it along.
        namespaces = ["unshare", "--mount", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
        with (root / "said").open("wb") as out:
            process = subprocess.Popen(
                dies_with_us([*namespaces, "bash", "-c", script]),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd="/",
            )
        try:
            _await_service(process, root)
            yield Libvirt(root)
        finally:
            process.kill()
            process.wait()
