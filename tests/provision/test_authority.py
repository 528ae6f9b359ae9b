"""The local authority: made once, finished after any interruption, shared by processes, never of two minds."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from crbd.errors import AuthorityAbsentError, AuthorityError
from crbd.provision import authority
from crbd.provision.authority import (
    AuthorityFiles,
    KeyKind,
    accept_certificate,
    default_directory,
    load_certificates,
    load_signing_key,
    open_authority,
    request_certificate,
)
from crbd.provision.certificates import Issuer, intermediate_certificate, root_certificate
from crbd.provision.signing import EkRequest, Specification, TpmAttributes

MADE = ["root-key.pem", "root-cert.pem", "issuer-key.pem", "issuer-cert.pem"]
"""In the order in which they are made."""
CREATE_AND_TELL = """
import sys
from pathlib import Path
from crbd.provision.authority import AuthorityFiles, KeyKind, open_authority
made = open_authority(AuthorityFiles.own(Path(sys.argv[1]), KeyKind.RSA_3072))
print(made.issuer.certificate.serial_number)
"""
CREATE_AND_DIE = """
import os, signal, sys
from pathlib import Path
left = int(sys.argv[2])
replace = Path.replace
def counted(self, target):
    global left
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left -= 1
    return replace(self, target)
Path.replace = counted
from crbd.cli.main import main
main(['ca', 'create', '--ca-dir', sys.argv[1]])
"""


def files(tmp_path: Path) -> AuthorityFiles:
    return AuthorityFiles.own(tmp_path / "ca")


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def request() -> EkRequest:
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    return EkRequest(key, "machine", Specification(), TpmAttributes())


def foreign_root() -> Issuer:
    key = ec.generate_private_key(ec.SECP384R1())
    return Issuer(root_certificate(key, "the company's root"), key)


def pem(*certificates: x509.Certificate) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def test_it_is_made_at_first_use_and_found_at_the_second(tmp_path: Path) -> None:
    first = open_authority(files(tmp_path))
    before = contents(tmp_path / "ca")
    second = open_authority(files(tmp_path))
    assert first.issuer.certificate == second.issuer.certificate
    assert contents(tmp_path / "ca") == before
    issuer, root = second.chain()
    issuer.verify_directly_issued_by(root)
    root.verify_directly_issued_by(root)
    made = x509.load_der_x509_certificate(second.ek_certificate(request()))
    made.verify_directly_issued_by(issuer)


def test_keys_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        open_authority(files(tmp_path))
    finally:
        os.umask(umask)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ca").iterdir()}
    assert modes == {
        ".lock": 0o600,
        "root-key.pem": 0o600,
        "root-cert.pem": 0o644,
        "issuer-key.pem": 0o600,
        "issuer-cert.pem": 0o644,
    }
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700


def test_it_is_not_made_where_that_was_not_asked_for(tmp_path: Path) -> None:
    with pytest.raises(AuthorityAbsentError, match="crbd ca create"):
        open_authority(files(tmp_path), create=False)
    assert not (tmp_path / "ca").exists()


@pytest.mark.parametrize("there", range(len(MADE)))
def test_a_beginning_is_gone_on_from(tmp_path: Path, there: int) -> None:
    open_authority(files(tmp_path))
    for name in MADE[there:]:
        (tmp_path / "ca" / name).unlink()
    before = contents(tmp_path / "ca")
    issuer, root = open_authority(files(tmp_path)).chain()
    issuer.verify_directly_issued_by(root)
    after = contents(tmp_path / "ca")
    assert sorted(after) == sorted([*MADE, ".lock"])
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize("whole", range(len(MADE)))
def test_killed_while_it_is_made_it_is_finished_by_the_next(tmp_path: Path, whole: int) -> None:
    killed = subprocess.run(
        [sys.executable, "-c", CREATE_AND_DIE, tmp_path / "ca", str(whole)], check=False, timeout=30
    )
    assert killed.returncode == -signal.SIGKILL
    left = contents(tmp_path / "ca")
    assert [name for name in MADE if name in left] == MADE[:whole]
    assert f".{MADE[whole]}.new" in left
    issuer, root = open_authority(files(tmp_path)).chain()
    issuer.verify_directly_issued_by(root)
    after = contents(tmp_path / "ca")
    assert all(after[name] == left[name] for name in MADE[:whole])
    assert not [name for name in after if name.endswith(".new")]


def test_processes_that_come_at_once_have_the_same_authority(tmp_path: Path) -> None:
    """RSA keys take so long that the others are waiting for the lock when they are made."""
    command = [sys.executable, "-c", CREATE_AND_TELL, str(tmp_path / "ca")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = {process.communicate(timeout=60)[0] for process in running}
    issuer, root = open_authority(files(tmp_path), create=False).chain()
    issuer.verify_directly_issued_by(root)
    assert told == {f"{issuer.serial_number}\n"}


def test_a_lock_that_is_never_given_back_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authority, "LOCK_PATIENCE", 0.1)
    open_authority(files(tmp_path))
    (tmp_path / "ca" / "issuer-cert.pem").unlink()
    command = ["flock", "--no-fork", str(tmp_path / "ca" / ".lock"), "cat"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        holder.stdin.write(b"held\n")
        holder.stdin.flush()
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AuthorityError, match=r"another process holds .*\.lock"):
            open_authority(files(tmp_path))
    finally:
        holder.communicate(timeout=10)


def test_counted_serial_numbers_are_never_given_out_twice(tmp_path: Path) -> None:
    counted = replace(files(tmp_path), serial=tmp_path / "ca" / "serial")
    opened = [open_authority(counted) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda number: opened[number % 8].next_terms().serial, range(80)))
    assert sorted(drawn) == list(range(min(drawn), min(drawn) + 80))
    assert int((tmp_path / "ca" / "serial").read_text()) == max(drawn)


@pytest.mark.parametrize("text", ["", "no number", "-7", str(2**159 - 1), "0x10"])
def test_counting_starts_anew_where_the_file_holds_no_number_to_count_on_from(tmp_path: Path, text: str) -> None:
    counted = replace(files(tmp_path), serial=tmp_path / "ca" / "serial")
    opened = open_authority(counted)
    (tmp_path / "ca" / "serial").write_text(text)
    serial = opened.next_terms().serial
    assert 10**17 <= serial < 10**18
    assert opened.next_terms().serial == serial + 1


def test_a_number_is_counted_on_from(tmp_path: Path) -> None:
    counted = replace(files(tmp_path), serial=tmp_path / "ca" / "serial")
    opened = open_authority(counted)
    (tmp_path / "ca" / "serial").write_text("41\n")
    made = x509.load_der_x509_certificate(opened.platform_certificate(request()))
    assert made.serial_number == 42


def test_other_serial_numbers_are_random(tmp_path: Path) -> None:
    opened = open_authority(files(tmp_path))
    assert len({opened.next_terms().serial for _ in range(100)}) == 100


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda ca: (ca / "issuer-key.pem").unlink(), "issuer-key.pem does not exist", id="no key"),
        pytest.param(lambda ca: (ca / "issuer-key.pem").write_text("?"), "no private key in PEM form", id="bad key"),
        pytest.param(lambda ca: (ca / "issuer-cert.pem").write_text("?"), "no certificate in PEM form", id="bad cert"),
        pytest.param(
            lambda ca: shutil.copy(ca / "root-key.pem", ca / "issuer-key.pem"),
            "do not belong together",
            id="another key",
        ),
        pytest.param(
            lambda ca: [(ca / name).unlink() for name in ("issuer-cert.pem", "root-key.pem")],
            "root-cert.pem exists without .*root-key.pem",
            id="half a root",
        ),
        pytest.param(lambda ca: (ca / "issuer-key.pem").write_bytes(bytes(2 << 20)), "more than 1048576", id="huge"),
    ],
)
def test_what_cannot_be_right_is_left_alone(tmp_path: Path, damage: Damage, message: str) -> None:
    open_authority(files(tmp_path))
    damage(tmp_path / "ca")
    before = contents(tmp_path / "ca")
    with pytest.raises(AuthorityError, match=message):
        open_authority(files(tmp_path))
    assert contents(tmp_path / "ca") == before


def test_an_offline_root_is_no_hindrance(tmp_path: Path) -> None:
    open_authority(files(tmp_path))
    (tmp_path / "ca" / "root-key.pem").unlink()
    open_authority(files(tmp_path)).ek_certificate(request())


def test_a_password_is_needed_and_the_right_one(tmp_path: Path) -> None:
    secret = replace(files(tmp_path), signing_password=b"secret", root_password=b"other")
    open_authority(secret)
    assert b"ENCRYPTED" in secret.signing_key.read_bytes()
    load_signing_key(secret.root_key, b"other")
    open_authority(secret)
    with pytest.raises(AuthorityError, match="no password was given"):
        open_authority(files(tmp_path))
    with pytest.raises(AuthorityError, match="its password is wrong"):
        open_authority(replace(secret, signing_password=b"wrong"))


def test_a_directory_that_cannot_be_used_or_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca").write_text("a file")
    with pytest.raises(AuthorityError, match=r"ca/issuer-cert\.pem cannot be used: Not a directory"):
        open_authority(files(tmp_path))
    with pytest.raises(AuthorityError, match="the authority's directory /proc/none/ca cannot be made"):
        open_authority(AuthorityFiles.own(Path("/proc/none/ca")))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_root_makes_in_anothers_directory_is_theirs(tmp_path: Path) -> None:
    (tmp_path / "ca").mkdir()
    os.chown(tmp_path / "ca", 12345, 12346)
    open_authority(replace(files(tmp_path), serial=tmp_path / "ca" / "serial")).next_terms()
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in (tmp_path / "ca").iterdir()}
    assert owners == {(12345, 12346)}


def test_rsa_keys_on_request(tmp_path: Path) -> None:
    opened = open_authority(AuthorityFiles.own(tmp_path / "ca", KeyKind.RSA_3072))
    for certificate in opened.chain():
        key = certificate.public_key()
        assert isinstance(key, rsa.RSAPublicKey)
        assert key.key_size == 3072


def test_the_default_directory_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert default_directory() == tmp_path / "crbd" / "ca"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert default_directory() == Path("/var/lib/crbd/ca")


class TestAnotherRoot:
    """The signing key certified by an authority of one's own: CSR out, certificate in."""

    def test_it_issues_once_it_has_its_certificate(self, tmp_path: Path) -> None:
        csr = x509.load_pem_x509_csr(request_certificate(files(tmp_path)))
        assert csr.is_signature_valid
        with pytest.raises(AuthorityError, match="waits for the certificate of"):
            open_authority(files(tmp_path))
        root = foreign_root()
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = intermediate_certificate(key, "crbd CA", root)
        accept_certificate(files(tmp_path), pem(certificate, root.certificate), "given")
        opened = open_authority(files(tmp_path), create=False)
        assert opened.chain() == [certificate, root.certificate]
        made = x509.load_der_x509_certificate(opened.ek_certificate(request()))
        made.verify_directly_issued_by(certificate)
        assert not files(tmp_path).root_key.exists()
        assert not files(tmp_path).pending_request.exists()

    def test_a_request_can_be_made_again_for_the_same_key(self, tmp_path: Path) -> None:
        first, second = (x509.load_pem_x509_csr(request_certificate(files(tmp_path))) for _ in range(2))
        assert first.public_key() == second.public_key()

    def test_an_authority_that_is_there_is_not_replaced(self, tmp_path: Path) -> None:
        open_authority(files(tmp_path))
        with pytest.raises(AuthorityError, match="exists: use another"):
            request_certificate(files(tmp_path))

    def test_certificates_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        csr = x509.load_pem_x509_csr(request_certificate(files(tmp_path)))
        before = contents(tmp_path / "ca")
        root, other = foreign_root(), foreign_root()
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = intermediate_certificate(key, "crbd CA", root)
        no_authority = (
            x509.CertificateBuilder(subject_name=certificate.subject, issuer_name=root.certificate.subject)
            .public_key(key)
            .serial_number(1)
            .not_valid_before(certificate.not_valid_before_utc)
            .not_valid_after(certificate.not_valid_after_utc)
            .sign(root.key, hashes.SHA384())
        )
        for given, message in (
            (pem(root.certificate), "certifies another key"),
            (pem(no_authority), "no authority's certificate"),
            (pem(certificate, other.certificate), "is not issued by the certificate after it"),
            (b"?", "no certificate in PEM form"),
        ):
            with pytest.raises(AuthorityError, match=message):
                accept_certificate(files(tmp_path), given, "given")
            assert contents(tmp_path / "ca") == before

    def test_a_certificate_without_its_chain_is_enough(self, tmp_path: Path) -> None:
        csr = x509.load_pem_x509_csr(request_certificate(files(tmp_path)))
        key = csr.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        certificate = intermediate_certificate(key, "crbd CA", foreign_root())
        accept_certificate(files(tmp_path), pem(certificate), "given")
        assert open_authority(files(tmp_path)).chain() == [certificate]
        assert load_certificates(files(tmp_path).issuer_certificate) == [certificate]
