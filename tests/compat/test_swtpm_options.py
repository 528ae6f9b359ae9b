"""Command lines that are refused and those that print something: in this process, since no daemon comes of them."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.compat import swtpm
from crbd.compat.launch import COMMANDS, main
from crbd.compat.swtpm_endpoints import Endpoints, endpoints_of
from crbd.compat.swtpm_options import LONG, TABLES, parse
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import UsageError
from crbd.server.endpoint import DescriptorEndpoint, TcpEndpoint, UnixEndpoint
from crbd.service.instance import Instance
from crbd.service.options import CheckpointPolicy, InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.store.layout import Layout, open_state
from tests.cli.states import contents

REFUSED = {
    "--tpmstate dir=PLACE --ctrl type=unixio,path=c": "swtpm: Error: TPM 1.2 is not supported by libtpms.",
    "--tpm2 stray": "swtpm: Unknown parameter 'stray'",
    "-p x": "swtpm: Cannot parse socket port number 'x'.",
    "-p 65536": "swtpm: Port is outside valid range.",
    "-f x": "swtpm: Cannot parse socket file descriptor.",
    "-f 9999": "swtpm: Cannot stat file descriptor: Bad file descriptor",
    "-f 0": "swtpm: Error: Cannot accept file descriptors with values 0, 1, or 2",
    "--print-info 1x": "swtpm: Cannot parse info value '1x'.",
    "--tpm2 --ctrl foo": "swtpm: Error parsing ctrl options: Unknown option 'foo'",
    "--tpm2 --ctrl fd=3": "swtpm: Missing type parameter for control channel",
    "--tpm2 --ctrl type=foo": "swtpm: Unsupported control channel type: foo",
    "--tpm2 --ctrl type=unixio": "swtpm: Missing path and fd options for UnixIO control channel",
    "--tpm2 --ctrl type=unixio,fd=9999": "swtpm: Bad filedescriptor 9999 for UnixIO control channel",
    "--tpm2 --ctrl type=unixio,clientfd=9999": "swtpm: Bad filedescriptor 9999 for UnixIO client control channel",
    "--tpm2 --ctrl type=tcp": "swtpm: Missing port and fd options for TCP control channel",
    "--tpm2 --ctrl type=tcp,port=70000": "swtpm: TCP control channel port outside valid range",
    "--tpm2 --ctrl type=tcp,fd=9999": "swtpm: Bad filedescriptor 9999 for TCP control channel",
    "--tpm2 --ctrl type=tcp,port=1,bindaddr=x": "swtpm: Could not parse the bind address 'x'",
    "--tpm2 --ctrl type=tcp,port=1,bindaddr=fe80::1": "swtpm: Missing interface name for link local address",
    "--tpm2 --ctrl type=tcp,port=1,bindaddr=fe80::1,ifname=no0": (
        "swtpm: Could not convert interface name 'no0' to index: No such device"
    ),
    "--tpm2 --server type=foo": "swtpm: Unsupported socket type: foo",
    "--tpm2 --server type=unixio": "swtpm: Missing path and file descriptor option for UnixIO socket",
    "--tpm2 --server type=tcp": "swtpm: TPM_PORT is not set or contains an invalid integer value.",
    "--tpm2 --server port=-2": "swtpm: No valid port number provided for TCP socket.",
    "--tpm2 --server port=70000": "swtpm: TCP socket port outside valid range",
    "--tpm2 --server fd=9999": "swtpm: Bad filedescriptor 9999 for TCP socket",
    f"--tpm2 --server type=unixio,path=/{'x' * 108}": "swtpm: Path for UnixIO socket is too long",
    "--tpm2 --key mode=aes-cbc": "swtpm: Either file=, fd=, pwdfile=, or pwdfd= is required for key option",
    "--tpm2 --key file=k,format=x": "swtpm: Unknown key format 'x'.",
    "--tpm2 --key file=k,mode=x": "swtpm: Unknown encryption mode 'x'.",
    "--tpm2 --key pwdfile=k,kdf=x": "swtpm: Unknown kdf 'x'.",
    "--tpm2 --key file=/no/key": "swtpm: Unable to open file /no/key: No such file or directory",
    "--tpm2 --migration-key foo": "swtpm: Error parsing key options: Unknown option 'foo'",
    "--tpm2 --pid foo=1": "swtpm: Error parsing pid options: Unknown option 'foo=1'",
    "--tpm2 --pid fd=9999": "swtpm: Bad filedescriptor 9999 for pid file",
    "--tpm2 --pid fd=-1": "swtpm: The file or fd parameter is required for the pid option.",
    "--tpm2 --locality 4": "swtpm: Error parsing locality options: Unknown option '4'",
    "--tpm2 --tpmstate lock": "swtpm: The dir or backend-uri parameters is required for the tpmstate option.",
    "--tpm2 --tpmstate dir=PLACE,mode=8": "swtpm: Error parsing tpmstate options: invalid mode type '8'",
    "--tpm2 --flags foo": "swtpm: Error parsing flags options: Unknown option 'foo'",
    "--tpm2 --flags startup-deactivated": "swtpm: TPM 2 does not support startup deactivated.",
    "--tpm2 --migration foo": "swtpm: Error parsing migration options: Unknown option 'foo'",
    "--tpm2 --log foo": "swtpm: Error parsing logging options: Unknown option 'foo'",
    "--tpm2 --log fd=9999": "swtpm: Could not access logfile using fd 9999: Bad file descriptor",
    "--tpm2 --log file=/no/log": "swtpm: Could not open logfile for writing: No such file or directory",
    "--tpm2 --runas nosuchuser": "swtpm: Error: User 'nosuchuser' does not exist.",
    "--tpm2 --runas 4294967296": "swtpm: Error: uid 4294967296 outside valid range.",
    "--tpm2 --pcap foo": "swtpm: Error parsing pcap options: Unknown option 'foo'",
    "--tpm2 --pcap file=/no/pcap": "swtpm: Could not open pcap file for writing: No such file or directory",
    "--tpm2 --pcap fd=9999": "swtpm: Could not seek to desired position in pcap file: Bad file descriptor",
    "--tpm2 --pcap truncate": "swtpm: Could not chmod the pcap file: Bad file descriptor",
    "--tpm2 --seccomp action=foo": "swtpm: Unsupported seccomp log action foo",
    "--tpm2 --seccomp foo": "swtpm: Error parsing seccomp options: Unknown option 'foo'",
    "--tpm2 --profile fd=-1": "swtpm: No profile option parameter given to get a profile",
    "--tpm2 --print-states": "swtpm: Error: --tpmstate option is required for --print-states",
}


@pytest.fixture(autouse=True)
def _as_a_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("TPM_PORT", "TPM_PATH", "NOTIFY_SOCKET"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "argv", ["swtpm"])
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("line", REFUSED)
def test_refused(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [word.replace("PLACE", str(tmp_path)) for word in line.split()]
    assert swtpm.main(["socket", *arguments]) == 1
    printed = capsys.readouterr()
    assert printed.err.splitlines()[0] == REFUSED[line]
    assert printed.out == ""


def test_an_unknown_option_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm.main(["socket", "--foo"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("socket: unrecognized option '--foo'\nUsage: swtpm socket [options]\n")


@pytest.mark.parametrize("interface", ["chardev", "cuse", "foo"])
def test_other_interfaces(interface: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm.main([interface, "--tpm2"]) == 1
    assert capsys.readouterr().err.startswith(f"Unsupported TPM interface type '{interface}'.\n")
    assert swtpm.main([]) == 1
    assert capsys.readouterr().err == "Missing TPM interface type.\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["-h"], ["--help"], ["socket", "-h"], ["socket", "--tpm2", "--he"]):
        assert swtpm.main(arguments) == 0
        printed = capsys.readouterr()
        assert "Usage: swtpm socket [options]" in printed.out
        assert printed.err == ""
    for word in ("-v", "--version"):
        assert swtpm.main([word]) == 0
        assert capsys.readouterr().out.startswith("TPM emulator version 0.")


def test_the_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm.main(["socket", "--help"]) == 0
    text = capsys.readouterr().out
    unnamed = [name for name in LONG if f"--{name.rstrip('=')}" not in text]
    assert unnamed == []
    assert {f"--{name.rstrip('=')}" for name in LONG} >= TABLES.keys()


def test_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm.main(["socket", "--print-capabilities"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.keys() == {"type", "features", "profiles", "version"}
    assert found["type"] == "swtpm"
    assert {"tpm-2.0", "cmdarg-migration", "nvram-backend-file", "rsa-keysize-2048"} <= set(found["features"])
    assert "tpm-1.2" not in found["features"]


def test_states(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def states(where: str) -> object:
        assert swtpm.main(["socket", "--tpm2", "--tpmstate", where, "--print-states"]) == 0
        return json.loads(capsys.readouterr().out)["states"]

    assert states(f"dir={tmp_path / 'absent'}") == []
    assert states(f"backend-uri=file://{tmp_path / 'absent'}") == []
    assert states(f"dir={tmp_path}") == []
    assert not list(tmp_path.iterdir())
    (tmp_path / "tpm2-00.permall").write_bytes(bytes(100))
    (tmp_path / "tpm2-00.volatilestate").write_bytes(bytes(10))
    assert states(f"backend-uri=dir://{tmp_path}") == [
        {"name": "permall", "size": 100},
        {"name": "volatilestate", "size": 10},
    ]


def test_states_of_crbds_own_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tpm.crbd").write_bytes(bytes(100))
    assert swtpm.main(["socket", "--tpm2", "--tpmstate", f"dir={tmp_path}", "--print-states"]) == 0
    assert json.loads(capsys.readouterr().out)["states"] == [{"name": "permall", "size": 100}]


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert swtpm.main(["socket", "--tpm2", "--print-info", "0x4"]) == 0
    assert "TPMFeatures" in json.loads(capsys.readouterr().out)
    assert swtpm.main(["socket", "--tpm2", "--print-info", "1", "--tpmstate", f"dir={tmp_path}"]) == 0
    assert "TPMSpecification" in json.loads(capsys.readouterr().out)
    assert (tmp_path / "tpm2-00.permall").exists()


@pytest.mark.parametrize("layout", [Layout.CRBD, Layout.SWTPM])
def test_info_of_a_tpm_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Layout) -> None:
    """Not even where its daemon was killed, or it is suspended: what is stored is for the one who goes on from it."""
    policy = CheckpointPolicy(every_command=layout is Layout.CRBD)
    store = open_state(tmp_path, create=True, layout=layout)
    options = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True, checkpoint=policy)
    instance = Instance(LibtpmsEngine, store, options)
    instance.begin()
    if layout is Layout.SWTPM:
        instance.store_volatile()
    assert store.load(StateKind.VOLATILE) is not None
    instance._engine.close()  # as by SIGKILL
    store.close()
    before = contents(tmp_path)
    assert swtpm.main(["socket", "--tpm2", "--print-info", "1", "--tpmstate", f"dir={tmp_path}"]) == 0
    assert "TPMSpecification" in json.loads(capsys.readouterr().out)
    assert contents(tmp_path) == before


def test_profiles_where_libtpms_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever libtpms this is: the command, the capability and the option say the same."""
    assert swtpm.main(["socket", "--print-capabilities"]) == 0
    able = "cmdarg-print-profiles" in capsys.readouterr().out
    assert swtpm.main(["socket", "--tpm2", "--print-profiles"]) == 0
    assert ("AvailableProfiles" in capsys.readouterr().out) is able


UNIX = UnixEndpoint(Path("/s"), 0o770, replace=True)


def test_endpoints() -> None:
    def found(line: str, **environment: str) -> Endpoints:
        return endpoints_of(parse(line.split()), environment)

    assert found("--ctrl type=unixio,path=/s") == Endpoints(ctrl=UNIX)
    assert found("--ctrl type=unixio,path=/s,mode=0600,uid=1,gid=2,terminate") == Endpoints(
        ctrl=UnixEndpoint(Path("/s"), 0o600, 1, 2, replace=True), end_with_ctrl_client=True
    )
    assert found("--server type=unixio,path=/s -t") == Endpoints(data=UNIX, end_with_data_client=True)
    assert found("-p 2321") == Endpoints(data=TcpEndpoint("127.0.0.1", 2321), disconnect=True)
    assert found("-p 0x911 --server port=5") == Endpoints(data=TcpEndpoint("127.0.0.1", 5))
    assert found("--server port=5,disconnect,bindaddr=::1 --ctrl type=tcp,port=6,bindaddr=0.0.0.0") == Endpoints(
        ctrl=TcpEndpoint("0.0.0.0", 6), data=TcpEndpoint("::1", 5), disconnect=True
    )
    assert found("--server type=tcp", TPM_PORT="7") == Endpoints(data=TcpEndpoint("127.0.0.1", 7))
    assert found("--tpm2", TPM_PORT="7") == Endpoints(data=TcpEndpoint("127.0.0.1", 7))
    assert found("--ctrl type=unixio,path=/s", TPM_PORT="7") == Endpoints(ctrl=UNIX)
    assert found("--tpm2") == Endpoints()


def test_a_link_local_address_goes_with_its_interface() -> None:
    line = parse(["--server", "port=5,bindaddr=fe80::1,ifname=lo"])
    assert endpoints_of(line, {}) == Endpoints(data=TcpEndpoint("fe80::1%lo", 5))


def test_descriptors_that_imply_the_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        number = theirs.fileno()
        data = DescriptorEndpoint(number)
        assert endpoints_of(parse(["--server", f"type=tcp,fd={number}"]), {}) == Endpoints(
            data=data, end_with_data_client=True
        )
        assert endpoints_of(parse(["--fd", str(number)]), {}) == Endpoints(data=data, end_with_data_client=True)
        assert endpoints_of(parse(["--server", f"type=unixio,fd={number}"]), {}) == Endpoints(data=data)
        assert endpoints_of(parse(["--ctrl", f"type=unixio,clientfd={number}"]), {}) == Endpoints(ctrl=data)


def test_a_descriptor_that_is_no_socket() -> None:
    reading, writing = os.pipe()
    with pytest.raises(UsageError, match=f"Bad filedescriptor {reading} for TCP socket"):
        endpoints_of(parse(["--server", f"fd={reading}"]), {})
    os.close(reading)
    os.close(writing)


def test_the_launcher_finds_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["crbd-compat", "/some/where/swtpm", "--version"]) == 0
    assert capsys.readouterr().out.startswith("TPM emulator")
    assert main(["crbd-compat", "/some/where/swtpm_cuse"]) == 1
    assert "there is no command 'swtpm_cuse'" in capsys.readouterr().err
    assert main(["crbd-compat"]) == 1
    assert {"swtpm", "swtpm_ioctl", "swtpm_bios", "swtpm_setup", "swtpm_localca", "swtpm_cert"} == COMMANDS.keys()
