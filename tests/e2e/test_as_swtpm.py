"""crbd in swtpm's place: programs that start `swtpm`, or talk to one that runs, get crbd and do not notice."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from .daemon import dies_with_us, fresh_directory
from .waiting import Deadline

pytestmark = pytest.mark.e2e

PATIENCE = 60
"""Seconds for anything that one of the clients does."""


@cache
def directory() -> Path:
    """The directory that goes first in PATH."""
    done = subprocess.run([sys.executable, "-m", "crbd", "compat-path"], check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def environment(**variables: str) -> Mapping[str, str]:
    """The environment of a host that switched to crbd."""
    # In a checkout that is not installed the launchers need to be told which Python has what crbd needs.
    ours = {"PATH": f"{directory()}:{os.environ['PATH']}:/usr/sbin", "CRBD_PYTHON": sys.executable}
    return os.environ | ours | variables


@contextmanager
def place() -> Iterator[Path]:
    """A directory for a TPM, by way of which sockets are reached too."""
    with fresh_directory() as made:
        (made / "state").mkdir()
        yield made


def shell(script: str, where: Path, **variables: str) -> str:
    """What a script says that must succeed; it runs in `where`."""
    done = subprocess.run(
        ["sh", "-ec", textwrap.dedent(script)],
        check=False,
        cwd=where,
        env=environment(**variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
    )
    errors = where / "errors"
    assert done.returncode == 0, (
        f"status {done.returncode}:\n{done.stdout}\n{errors.read_text() if errors.exists() else ''}"
    )
    return done.stdout


@contextmanager
def swtpm(where: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """`swtpm socket` by PATH, from the moment that its pid file is there; at the end it must end by SIGTERM."""
    (where / "pid").unlink(missing_ok=True)
    command = ["swtpm", "socket", "--tpm2", "--tpmstate", f"dir={where / 'state'}", "--pid", f"file={where / 'pid'}"]
    path = environment()["PATH"]
    program = shutil.which(command[0], path=path)
    assert program == str(directory() / "swtpm")
    with (
        (where / "errors").open("ab") as errors,
        subprocess.Popen(
            dies_with_us([program, *command[1:], *options]), stdin=subprocess.DEVNULL, stderr=errors, env=environment()
        ) as process,
    ):
        try:
            deadline = Deadline(PATIENCE)
            while not (where / "pid").exists() or not (where / "pid").read_text():
                assert process.poll() is None, (where / "errors").read_text()
                assert not deadline.passed, "no pid file"
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


@contextmanager
def swtpm_with_sockets(where: Path) -> Iterator[str]:
    """A TPM that is on; yields the TCTI's configuration."""
    sockets = ("--server", f"type=unixio,path={where / 'tpm'}", "--ctrl", f"type=unixio,path={where / 'tpm.ctrl'}")
    with swtpm(where, *sockets, "--flags", "not-need-init,startup-clear"):
        yield f"swtpm:path={where / 'tpm'}"


def free_ports() -> tuple[int, int]:
    """Two neighbouring TCP ports of the loopback interface that nobody listens at."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port, port + 1


SETUPS = {
    "plain": (),
    "passphrase": ("--pwdfile", "passphrase", "--cipher", "aes-256-cbc"),
    "key": ("--keyfile", "key"),
    "locked": ("--lock-nvram",),
}


@pytest.mark.parametrize("name", SETUPS)
def test_swtpm_setup_of_debian(name: str) -> None:
    """Debian's swtpm_setup starts our `swtpm`; what it made is read by our `swtpm` and by Debian's."""
    with place() as where:
        (where / "passphrase").write_text("correct horse")
        (where / "key").write_text("00112233445566778899aabbccddeeff")
        (where / "ca").mkdir()
        (where / "localca.conf").write_text(
            f"statedir = {where}/ca\nsigningkey = {where}/ca/key.pem\nissuercert = {where}/ca/cert.pem\n"
            f"certserial = {where}/ca/serial\n"
        )
        (where / "localca.options").write_text(
            "--platform-manufacturer crbd\n--platform-version 1\n--platform-model test\n"
        )
        (where / "setup.conf").write_text(
            "create_certs_tool = /usr/bin/swtpm_localca\n"
            f"create_certs_tool_config = {where}/localca.conf\ncreate_certs_tool_options = {where}/localca.options\n"
        )
        options = " ".join(SETUPS[name])
        shell(
            f"""
            /usr/bin/swtpm_setup --tpm2 --tpm "{directory()}/swtpm socket" --tpm-state state --config setup.conf \
                --createek --ecc --create-ek-cert --create-platform-cert --pcr-banks sha256,sha384 --overwrite {options}
            """,
            where,
        )
        key = {"passphrase": ("pwdfile=passphrase,mode=aes-256-cbc",), "key": ("file=key",)}.get(name, ())
        for program in (str(directory() / "swtpm"), "/usr/bin/swtpm"):
            given = [word for option in key for word in ("--key", option.replace("=", f"={where}/", 1))]
            indices = shell(
                f"""
                {program} socket --tpm2 --tpmstate dir=state --flags not-need-init,startup-clear -d --pid file=pid \
                    --server type=unixio,path=tpm --ctrl type=unixio,path=tpm.ctrl {" ".join(given)}
                tpm2_getcap -T swtpm:path={where}/tpm handles-nv-index
                tpm2_getcap -T swtpm:path={where}/tpm handles-persistent
                tpm2_getcap -T swtpm:path={where}/tpm pcrs
                swtpm_ioctl --unix tpm.ctrl -s
                """.replace("dir=state", f"dir={where}/state")
                .replace("file=pid", f"file={where}/pid")
                .replace("path=tpm", f"path={where}/tpm"),
                where,
            )
            # The certificates of the TCG EK Credential Profile and of the platform.
            assert "0x1C08000" in indices
            assert "0x1C00016" in indices or "0x1C0000A" in indices
            assert "0x8101" in indices
            wait_gone(where / "pid")


def wait_gone(path: Path) -> None:
    """Until a daemon that was told to end took its pid file away."""
    deadline = Deadline(PATIENCE)
    while path.exists():
        assert not deadline.passed, f"{path} is still there"


def test_tpm2_tools_by_unix_and_tcp() -> None:
    with place() as where:
        with swtpm_with_sockets(where) as tcti:
            shell(
                "tpm2_getrandom --hex 8; tpm2_createprimary -c p.ctx; tpm2_pcrread sha256", where, TPM2TOOLS_TCTI=tcti
            )
        data, control = free_ports()
        options = ("--server", f"type=tcp,port={data}", "--ctrl", f"type=tcp,port={control}")
        with swtpm(where, *options, "--flags", "not-need-init"):
            tcti = f"swtpm:host=127.0.0.1,port={data}"
            shell("tpm2_startup -c; tpm2_getrandom --hex 8; tpm2_selftest -f", where, TPM2TOOLS_TCTI=tcti)


PYTSS = """
    import sys
    from tpm2_pytss import ESAPI, TCTILdr, TPM2_SU
    with TCTILdr("swtpm", sys.argv[1]) as tcti:
        with ESAPI(tcti) as esapi:
            esapi.startup(TPM2_SU.CLEAR)
        with ESAPI(tcti) as esapi:
            assert len(bytes(esapi.get_random(16))) == 16
            handle, *_ = esapi.create_primary(None, "rsa2048")
            esapi.flush_context(handle)
"""


def test_as_tpm2_pytss_starts_it() -> None:
    """Its tests run `swtpm socket --tpm2 --server port=N --ctrl type=tcp,port=N+1 --flags not-need-init`."""
    with place() as where:
        data, control = free_ports()
        options = ("--server", f"port={data}", "--ctrl", f"type=tcp,port={control}", "--flags", "not-need-init")
        with swtpm(where, *options):
            done = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(PYTSS), f"port={data}"],
                check=False,
                capture_output=True,
                text=True,
                timeout=PATIENCE,
            )
            assert done.returncode == 0, done.stderr


def test_tpm2_abrmd_on_top() -> None:
    """The resource manager keeps a connection of its own and swaps objects in and out."""
    with place() as where, swtpm_with_sockets(where) as tcti:
        said = shell(
            f"""
            exec dbus-run-session -- sh -ec '
                tpm2-abrmd --session --allow-root --tcti={tcti} & manager=$!
                tries=0
                until tpm2_getrandom --hex 8; do
                    tries=$((tries + 1)); test $tries -lt 50; kill -0 $manager
                done
                for name in a b c d; do tpm2_createprimary -c $name.ctx -G ecc; done
                tpm2_create -C a.ctx -u key.pub -r key.priv
                tpm2_load -C a.ctx -u key.pub -r key.priv -c key.ctx
                echo measured > file
                tpm2_sign -c key.ctx -o signature file
                tpm2_verifysignature -c key.ctx -s signature -m file
                kill $manager
                wait $manager || true
            '
            """,
            where,
            TPM2TOOLS_TCTI="tabrmd:bus_type=session",
        )
        assert "rror: " not in said.split("name-alg", 1)[-1]


@pytest.mark.parametrize("server", ["raw", "mssim"])
def test_ibm_tss(server: str) -> None:
    """IBM's TSS over TCP: plain commands as to swtpm, and behind the simulator's command header."""
    with place() as where:
        data, control = free_ports()
        options = ("--server", f"type=tcp,port={data}", "--ctrl", f"type=tcp,port={control}")
        with swtpm(where, *options, "--flags", "not-need-init"):
            said = shell(
                """
                tssstartup
                tssgetrandom -by 8
                tsspcrextend -ha 16 -halg sha256 -ic abc
                tsspcrread -ha 16 -halg sha256
                tsscreateprimary -hi o -ecc nistp256 -si
                echo measured > file
                tsssign -hk 80000000 -halg sha256 -ecc -if file -os signature
                tssverifysignature -hk 80000000 -halg sha256 -ecc -if file -is signature
                tssstartauthsession -se h
                tssgetcapability -cap 1 -pr 02000000
                tssflushcontext -ha 02000000
                tssflushcontext -ha 80000000
                """,
                where,
                TPM_INTERFACE_TYPE="socsim",
                TPM_SERVER_TYPE=server,
                TPM_SERVER_NAME="127.0.0.1",
                TPM_COMMAND_PORT=str(data),
                TPM_PLATFORM_PORT=str(control),
                TPM_DATA_DIR=str(where),
            )
            assert "02000000" in said


def test_clevis() -> None:
    """A secret sealed to PCR 16 comes back, in another life of the TPM too, and not once the PCR has changed."""
    with place() as where:
        policy = '{"pcr_bank":"sha256","pcr_ids":"16"}'
        with swtpm_with_sockets(where) as tcti:
            seal = f"echo secret | clevis encrypt tpm2 '{policy}' > jwe; clevis decrypt < jwe"
            assert shell(seal, where, TPM2TOOLS_TCTI=tcti) == "secret\n"
        with swtpm_with_sockets(where) as tcti:
            assert shell("clevis decrypt < jwe", where, TPM2TOOLS_TCTI=tcti) == "secret\n"
            extend = f"tpm2_pcrextend 16:sha256={'11' * 32}; if clevis decrypt < jwe > out 2>&1; then exit 9; fi"
            shell(extend, where, TPM2TOOLS_TCTI=tcti)


def test_systemd_creds_and_cryptenroll() -> None:
    """systemd opens the TPM by the name of its TCTI: a credential there and back, a LUKS volume's new key slot."""
    with place() as where, swtpm_with_sockets(where) as tcti:
        said = shell(
            f"""
            tpm2_pcrextend 16:sha256={"11" * 32}
            printf secret | systemd-creds encrypt --with-key=tpm2 --tpm2-device={tcti} --tpm2-pcrs=16 --name=it - sealed
            systemd-creds decrypt --tpm2-device={tcti} --name=it sealed opened
            test "$(cat opened)" = secret
            truncate -s 32M volume
            printf passphrase > passphrase
            cryptsetup luksFormat -q --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 volume passphrase
            PASSWORD=passphrase systemd-cryptenroll --tpm2-device={tcti} --tpm2-pcrs=16 volume
            systemd-cryptenroll volume
            tpm2_pcrextend 16:sha256={"22" * 32}
            if systemd-creds decrypt --tpm2-device={tcti} --name=it sealed again; then exit 9; fi
            """,
            where,
            TPM2TOOLS_TCTI=tcti,
        )
        assert "1 tpm2" in said
