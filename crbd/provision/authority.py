"""The local certificate authority: a root and, signed by it, the authority that certifies TPMs.

Theory. An authority is four files, made at first use under a lock and in this order, each whole and durable before the
next: root key, root certificate, signing key, issuer certificate. So what an interruption left is a beginning of that
list, and the next run goes on from it; the issuer certificate, the last, says that all is there. A certificate without
its key is never a beginning: it is somebody's authority whose key is elsewhere, and is left alone.

Who has an authority of their own asks for a certificate of the signing key instead: `request` makes that key and a CSR,
and until `accept` is given the certificate nothing is issued.

Serial numbers are random (159 bits) or, where a file to count in is given as swtpm's configuration does, one above the
last, which is durable before it is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from crbd.errors import AuthorityAbsentError, AuthorityError
from crbd.provision.certificates import (
    SERIAL_BYTES,
    Issuer,
    SigningKey,
    Terms,
    devid_certificate,
    ek_certificate,
    intermediate_certificate,
    platform_certificate,
    random_serial,
    root_certificate,
    signature_hash,
)
from crbd.provision.signing import DevIdRequest, EkRequest
from crbd.provision.tokens import TokenUri, open_token_key
from crbd.store.files import sync_directory

LOCK_PATIENCE = 60.0
"""Seconds to wait for another process that makes the authority or counts a serial number."""
LOCK_INTERVAL = 0.02
"""Seconds between two tries of the lock."""
MAX_FILE = 1 << 20
"""Bytes of a key or certificate file at most."""
_SERIAL_DIGITS = 18
"""Decimal digits of the random number that counting starts with: swtpm 0.7 reads no number above 64 bits."""


class KeyKind(Enum):
    """The keys that a new authority is given."""

    ECC_P384 = "ecc-p384"
    RSA_3072 = "rsa3072"

    def make(self) -> rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey:
        """A new private key of this kind."""
        if self is KeyKind.RSA_3072:
            return rsa.generate_private_key(65537, 3072)
        return ec.generate_private_key(ec.SECP384R1())


@dataclass(frozen=True, slots=True)
class AuthorityFiles:
    """Where an authority lies, and how a new one is made."""

    directory: Path
    signing_key: Path
    issuer_certificate: Path
    root_key: Path
    root_certificate: Path
    """What stands above the issuer: the root's certificate, or the chain up to it."""
    lock: Path
    serial: Path | None = None
    """Where serial numbers are counted; None: they are random."""
    key_kind: KeyKind = KeyKind.ECC_P384
    key_mode: int = 0o600
    root_name: str = "crbd root CA"
    issuer_name: str = "crbd CA"
    signing_password: bytes | None = None
    root_password: bytes | None = None

    @classmethod
    def own(cls, directory: Path, key_kind: KeyKind = KeyKind.ECC_P384) -> AuthorityFiles:
        """crbd's own layout: everything in one directory."""
        return cls(
            directory,
            signing_key=directory / "issuer-key.pem",
            issuer_certificate=directory / "issuer-cert.pem",
            root_key=directory / "root-key.pem",
            root_certificate=directory / "root-cert.pem",
            lock=directory / ".lock",
            key_kind=key_kind,
        )

    @property
    def pending_request(self) -> Path:
        """The CSR that waits for its certificate."""
        return self.directory / "issuer-request.pem"


def default_directory() -> Path:
    """Where the authority is if nobody says otherwise: /var/lib/crbd/ca for root and for whom it belongs to, else
    crbd/ca in the user's data directory (XDG_DATA_HOME)."""
    system = Path("/var/lib/crbd/ca")
    if os.geteuid() == 0 or os.access(system, os.R_OK | os.W_OK | os.X_OK):
        return system
    data = os.environ.get("XDG_DATA_HOME", "")
    home = Path(data) if data.startswith("/") else Path("~/.local/share").expanduser()
    return home / "crbd" / "ca"


class LocalAuthority:
    """Signs with keys from files: a `CertificateSigner` and `DevIdSigner`; made by `open_authority`."""

    def __init__(self, files: AuthorityFiles, issuer: Issuer) -> None:
        self._files = files
        self._issuer = issuer

    @property
    def issuer(self) -> Issuer:
        """Who signs."""
        return self._issuer

    def chain(self) -> list[x509.Certificate]:
        """The issuer's certificate and those above it, as far as they are here. Raises AuthorityError."""
        above = self._files.root_certificate
        return [self._issuer.certificate, *(load_certificates(above) if _exists(above) else [])]

    def ek_certificate(self, request: EkRequest) -> bytes:
        """DER of the endorsement key's certificate. Raises AuthorityError."""
        return ek_certificate(request, self._issuer, self.next_terms())

    def platform_certificate(self, request: EkRequest) -> bytes:
        """DER of the platform certificate. Raises AuthorityError."""
        return platform_certificate(request, self._issuer, self.next_terms())

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        """DER of the IAK's or IDevID's certificate. Raises AuthorityError."""
        try:
            return devid_certificate(request, self._issuer, self.next_terms())
        except ValueError as error:
            raise AuthorityError(
                f"no {request.kind.value} certificate can be issued: {error}", "certify the endorsement key first"
            ) from error

    def next_terms(self) -> Terms:
        """Terms with a serial number that was never given out before. Raises AuthorityError."""
        if self._files.serial is None:
            return Terms(random_serial())
        with _locked(self._files):
            return Terms(_count(self._files, self._files.serial))


def open_authority(files: AuthorityFiles, *, create: bool = True, certificate_url: str = "") -> LocalAuthority:
    """The authority in `files`; with `create` it is made, or its making finished, where it is not whole.

    Raises AuthorityError; AuthorityAbsentError where there is none and it may not be made.
    """
    if not _exists(files.issuer_certificate):
        if not create:
            raise _absent(files)
        _make_directories(files)
        with _locked(files):
            # Another process may have made it while this one waited.
            if not _exists(files.issuer_certificate):
                _make(files)
    (certificate, *_), key = load_certificates(files.issuer_certificate), _load_key(files)
    if certificate.public_key() != key.public_key():
        raise AuthorityError(
            f"{files.issuer_certificate} and {files.signing_key} do not belong together", "put the right pair there"
        )
    return LocalAuthority(files, Issuer(certificate, key, certificate_url))


def open_token_authority(files: AuthorityFiles, uri: str, *, certificate_url: str = "") -> LocalAuthority:
    """The authority whose issuer's certificate is in `files` and whose signing key is in a PKCS#11 token.

    Nothing is made. Raises AuthorityError, UsageError.
    """
    certificate = load_certificates(files.issuer_certificate)[0]
    key = open_token_key(TokenUri.parse(uri), certificate)
    return LocalAuthority(files, Issuer(certificate, key, certificate_url))


def request_certificate(files: AuthorityFiles) -> bytes:
    """PEM of a CSR for the signing key, which is made where there is none; it waits for `accept_certificate`.

    Raises AuthorityError where there is an authority already.
    """
    _make_directories(files)
    with _locked(files):
        if _exists(files.issuer_certificate):
            raise AuthorityError(
                f"{files.issuer_certificate} exists", "use another --ca-dir for an authority of another root"
            )
        key = _signing_key(files)
        builder = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, files.issuer_name)])
        )
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        text = builder.sign(key, signature_hash(key)).public_bytes(Encoding.PEM)
        _write(files, files.pending_request, text, 0o644)
    return text


def accept_certificate(files: AuthorityFiles, pem: bytes, name: str) -> None:
    """Make the certificate in `pem`, with the chain above it if that follows, the issuer's. `name` is for messages.

    Raises AuthorityError where it is not for our key, or not for an authority.
    """
    certificate, *above = _parse_certificates(pem, name)
    with _locked(files):
        if certificate.public_key() != _load_key(files).public_key():
            raise AuthorityError(
                f"{name} certifies another key than {files.signing_key}", "give the certificate of the last request"
            )
        if not _may_issue(certificate):
            raise AuthorityError(f"{name} is no authority's certificate", "have it issued with CA:TRUE and keyCertSign")
        lower = certificate
        for upper in above:
            _check_issued(lower, upper, name)
            lower = upper
        if above:
            _write(files, files.root_certificate, _pem(above), 0o644)
        _write(files, files.issuer_certificate, _pem([certificate]), 0o644)
        files.pending_request.unlink(missing_ok=True)


# -- making
# ----------------------------------------------------------------------------------------------------------------


def _make(files: AuthorityFiles) -> None:
    """Go on from what is there. Under the lock."""
    if _exists(files.pending_request):
        raise AuthorityError(
            f"the authority in {files.directory} waits for the certificate of {files.pending_request.name}",
            "have that signed and give it to crbd ca import",
        )
    root = _root(files)
    key = _signing_key(files)
    public_key = key.public_key()
    if not isinstance(public_key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise AuthorityError(f"{files.signing_key} is no RSA or ECC key", "put one of these there")
    certificate = intermediate_certificate(public_key, files.issuer_name, root)
    _write(files, files.issuer_certificate, _pem([certificate]), 0o644)


def _root(files: AuthorityFiles) -> Issuer:
    if _exists(files.root_key):
        key = load_signing_key(files.root_key, files.root_password)
    elif _exists(files.root_certificate):
        raise AuthorityError(
            f"{files.root_certificate} exists without {files.root_key}", "bring the root key back, or remove both"
        )
    else:
        key = files.key_kind.make()
        _write(files, files.root_key, _private_pem(key, files.root_password), files.key_mode)
    if not _exists(files.root_certificate):
        _write(files, files.root_certificate, _pem([root_certificate(key, files.root_name)]), 0o644)
    certificate = load_certificates(files.root_certificate)[0]
    if certificate.public_key() != key.public_key():
        raise AuthorityError(
            f"{files.root_certificate} and {files.root_key} do not belong together", "put the right pair there"
        )
    return Issuer(certificate, key)


def _signing_key(files: AuthorityFiles) -> SigningKey:
    if _exists(files.signing_key):
        return _load_key(files)
    key = files.key_kind.make()
    _write(files, files.signing_key, _private_pem(key, files.signing_password), files.key_mode)
    return key


def _make_directories(files: AuthorityFiles) -> None:
    for directory in dict.fromkeys((files.directory, files.signing_key.parent, files.issuer_certificate.parent)):
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise AuthorityError(
                f"the authority's directory {directory} cannot be made: {error.strerror}", "name another with --ca-dir"
            ) from error


def _count(files: AuthorityFiles, path: Path) -> int:
    """The number after the last one, durable in its file. Under the lock."""
    try:
        serial = int(_read(path)) + 1
    except (ValueError, FileNotFoundError):
        serial = 0
    if not 0 < serial < 1 << (SERIAL_BYTES * 8 - 1):
        serial = 10 ** (_SERIAL_DIGITS - 1) + random_serial() % (9 * 10 ** (_SERIAL_DIGITS - 1))
    _write(files, path, str(serial).encode(), 0o644)
    return serial


# -- files
# -----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _locked(files: AuthorityFiles) -> Iterator[None]:
    """Alone with the authority's files: the lock (flock) that swtpm_localca takes too. Raises AuthorityError."""
    try:
        descriptor = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise _inaccessible(files.lock, error) from error
    try:
        _adopt(files, descriptor)
        deadline = time.monotonic() + LOCK_PATIENCE
        while not _try_lock(descriptor):
            if time.monotonic() > deadline:
                raise AuthorityError(
                    f"another process holds {files.lock} for {LOCK_PATIENCE:.0f} s", "see what it waits for"
                )
            time.sleep(LOCK_INTERVAL)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _exists(path: Path) -> bool:
    """Raises AuthorityError where that cannot be seen."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _inaccessible(path, error) from error
    return True


def _write(files: AuthorityFiles, path: Path, data: bytes, mode: int) -> None:
    """Put a whole file at `path`: after an interruption it is the old, the new or none. Raises AuthorityError."""
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.unlink(missing_ok=True)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as file:
            _adopt(files, descriptor)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        temporary.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise _inaccessible(path, error) from error


def _adopt(files: AuthorityFiles, descriptor: int) -> None:
    """What root makes in another user's directory is that user's: else they could never use it again."""
    if os.geteuid() == 0:
        owner = files.directory.stat()
        os.fchown(descriptor, owner.st_uid, owner.st_gid)


def _read(path: Path) -> bytes:
    """Raises AuthorityError; FileNotFoundError where there is none."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _inaccessible(path, error) from error
    if len(data) > MAX_FILE:
        raise AuthorityError(f"{path} has more than {MAX_FILE} bytes", "check the path")
    return data


def _load_key(files: AuthorityFiles) -> SigningKey:
    return load_signing_key(files.signing_key, files.signing_password)


def load_signing_key(path: Path, password: bytes | None) -> SigningKey:
    """The private key in a PEM file. Raises AuthorityError."""
    try:
        # The check left out (primes, 30 ms and more) guards against keys from strangers; whether this one fits its
        # certificate is seen from the public key.
        key = load_pem_private_key(_read(path), password, unsafe_skip_rsa_key_validation=True)
    except FileNotFoundError as error:
        raise AuthorityError(f"{path} does not exist, but its certificate does", "bring the key back") from error
    except TypeError as error:
        needs = "is encrypted and no password was given" if password is None else "is not encrypted, but has a password"
        raise AuthorityError(f"{path} {needs}", "set the password to what the key has") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise AuthorityError(
            f"{path} holds no private key in PEM form, or its password is wrong", "bring the key back"
        ) from error
    if not isinstance(
        key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
    ):
        raise AuthorityError(f"{path} holds a key that cannot sign certificates", "use an RSA, ECC or Ed25519 key")
    return key


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, at least one. Raises AuthorityError."""
    try:
        return _parse_certificates(_read(path), str(path))
    except FileNotFoundError as error:
        raise AuthorityError(f"{path} does not exist", "check the path") from error


def _parse_certificates(pem: bytes, name: str) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise AuthorityError(f"{name} holds no certificate in PEM form", "bring the certificate back") from error


def _may_issue(certificate: x509.Certificate) -> bool:
    try:
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    except x509.ExtensionNotFound:
        return False
    return constraints.ca and usage.key_cert_sign


def _check_issued(lower: x509.Certificate, upper: x509.Certificate, name: str) -> None:
    try:
        lower.verify_directly_issued_by(upper)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise AuthorityError(
            f"{name}: {lower.subject.rfc4514_string()!r} is not issued by the certificate after it",
            "give the chain in order, the root last",
        ) from error


def _private_pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None) -> bytes:
    encryption: KeySerializationEncryption = NoEncryption() if password is None else BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _pem(certificates: list[x509.Certificate]) -> bytes:
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def _inaccessible(path: Path, error: OSError) -> AuthorityError:
    return AuthorityError(f"{path} cannot be used: {error.strerror}", "let this user read and write there")


def _absent(files: AuthorityFiles) -> AuthorityAbsentError:
    return AuthorityAbsentError(
        f"there is no certificate authority in {files.directory}", "crbd ca create makes one, and so does its first use"
    )
