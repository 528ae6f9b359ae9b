"""Who certifies TPMs: what `--signer` names, and the signers that are other programs.

    local              crbd's own authority (crbd.provision.authority), made at first use
    exec:PROGRAM       a program is given the request as JSON on its standard input and prints the certificate
    tool:PROGRAM       a program with the command line of swtpm_localca (swtpm's create_certs_tool)
    pkcs11:URI         a key in a PKCS#11 token; the issuer's certificate is in the authority's directory

A program's certificate is looked at before it is used: it must be one, and for the key that was asked for.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crbd.errors import AuthorityError, UsageError
from crbd.provision.authority import AuthorityFiles, default_directory, open_authority, open_token_authority
from crbd.provision.certificates import serial_number_of_tpm
from crbd.provision.signing import CertificateSigner, DevIdRequest, EkRequest
from crbd.provision.tokens import SCHEME

if TYPE_CHECKING:
    from crbd.provision.signing import KeyPublic

PROGRAM_TIMEOUT = 120.0
"""Seconds that a program may take for one certificate."""
MAX_CERTIFICATE = 65_535
"""Bytes of a certificate at most; a TPM takes far less."""
_FORMS = "use local, exec:PROGRAM, tool:PROGRAM or pkcs11:URI"


def open_signer(spec: str = "local", ca_directory: Path | None = None, certificate_url: str = "") -> CertificateSigner:
    """The signer that `--signer`, `--ca-dir` and `--ca-url` name. Raises UsageError, AuthorityError."""
    if spec == "local":
        files = AuthorityFiles.own(default_directory() if ca_directory is None else ca_directory)
        return open_authority(files, certificate_url=certificate_url)
    if spec.startswith(SCHEME):
        files = AuthorityFiles.own(default_directory() if ca_directory is None else ca_directory)
        return open_token_authority(files, spec, certificate_url=certificate_url)
    if ca_directory is not None or certificate_url:
        raise UsageError(f"--signer {spec} has no use for --ca-dir and --ca-url", "leave them out")
    kind, _, program = spec.partition(":")
    if kind == "exec" and program:
        return ProgramSigner(program)
    if kind == "tool" and program:
        return ToolSigner(CertsTool(program))
    raise UsageError(f"--signer {spec!r} names no signer", _FORMS)


class ProgramSigner:
    """`exec:PROGRAM`. The JSON is described in docs/certificates.md."""

    def __init__(self, program: str) -> None:
        self._program = program

    def ek_certificate(self, request: EkRequest) -> bytes:
        """DER of the endorsement key's certificate. Raises AuthorityError."""
        return self._ask("ek", request)

    def platform_certificate(self, request: EkRequest) -> bytes:
        """DER of the platform certificate. Raises AuthorityError."""
        return self._ask("platform", request)

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        """DER of the IAK's or IDevID's certificate. Raises AuthorityError."""
        return self._ask(request.kind.value, request)

    def _ask(self, kind: str, request: EkRequest | DevIdRequest) -> bytes:
        text = json.dumps(_described(kind, request)).encode()
        answer = _run([self._program], text)
        try:
            der = x509.load_pem_x509_certificate(answer).public_bytes(Encoding.DER)
        except ValueError:
            der = answer
        return _checked(der, request.public_key, self._program)


@dataclass(frozen=True, slots=True)
class CertsTool:
    """A program that takes swtpm_localca's options, and its two configuration files (none: its defaults)."""

    program: str
    configuration: str = ""
    options: str = ""
    log_file: str = ""


class ToolSigner:
    """`tool:PROGRAM`: swtpm's interface, by which it leaves `ek.cert` or `platform.cert` in a directory.

    `report` is given the command line and then what the program prints, line by line.
    """

    def __init__(self, tool: CertsTool, report: Callable[[str], None] | None = None) -> None:
        self._tool = tool
        self._report = report

    def ek_certificate(self, request: EkRequest) -> bytes:
        """DER of the endorsement key's certificate. Raises AuthorityError."""
        return self._ask("ek", request, ("--ek", key_parameters(request.public_key), *_variants(request)))

    def platform_certificate(self, request: EkRequest) -> bytes:
        """DER of the platform certificate. Raises AuthorityError."""
        return self._ask("platform", request, ("--ek", key_parameters(request.public_key), *_variants(request)))

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        """DER of the IAK's or IDevID's certificate. Raises AuthorityError."""
        try:
            serial_number = serial_number_of_tpm(request.attributes, request.ek_certificate)
        except ValueError as error:
            raise AuthorityError(str(error), "have the EK certified by an authority with a key identifier") from error
        key = ("--key", key_parameters(request.public_key), "--tpm-serial-num", serial_number)
        return self._ask(request.kind.value, request, key)

    def _ask(self, kind: str, request: EkRequest | DevIdRequest, key: tuple[str, ...]) -> bytes:
        with tempfile.TemporaryDirectory(prefix="crbd-certs.") as directory:
            command = [self._tool.program, "--type", kind, *key, "--dir", directory, *self._common(request)]
            self._tell(f"  Invoking {' '.join(command)}")
            output = _run(command, b"")
            name = Path(self._tool.program).name
            for line in output.decode(errors="replace").splitlines():
                self._tell(f"{name}: {line}")
            made = Path(directory, f"{kind}.cert")
            try:
                der = made.read_bytes()
            except OSError as error:
                raise AuthorityError(
                    f"{self._tool.program} left no {made.name}: {error.strerror}", "see what it wrote to its log"
                ) from error
        return _checked(der, request.public_key, self._tool.program)

    def _common(self, request: EkRequest | DevIdRequest) -> list[str]:
        options = []
        if self._tool.log_file:
            options += ["--logfile", self._tool.log_file]
        if request.subject:
            options += ["--vmid", request.subject]
        specification, tpm = request.specification, request.attributes
        options += ["--tpm-spec-family", specification.family, "--tpm-spec-level", str(specification.level)]
        options += ["--tpm-spec-revision", str(specification.revision), "--tpm-manufacturer", tpm.manufacturer]
        options += ["--tpm-model", tpm.model, "--tpm-version", tpm.version, "--tpm2"]
        if self._tool.configuration:
            options += ["--configfile", self._tool.configuration]
        if self._tool.options:
            options += ["--optsfile", self._tool.options]
        return options

    def _tell(self, line: str) -> None:
        if self._report is not None:
            self._report(line)


def key_parameters(key: KeyPublic) -> str:
    """A public key as swtpm_localca takes it: an RSA modulus in hexadecimal digits, or x=…,y=…,id=CURVE."""
    if isinstance(key, RSAPublicKey):
        return f"{key.public_numbers().n:0{key.key_size // 4}x}"
    numbers, digits = key.public_numbers(), (key.key_size + 7) // 8 * 2
    return f"x={numbers.x:0{digits}x},y={numbers.y:0{digits}x},id={key.curve.name}"


def _variants(request: EkRequest) -> tuple[str, ...]:
    if not request.allow_signing:
        return ()
    return ("--allow-signing", "--decryption") if request.decryption else ("--allow-signing",)


def _described(kind: str, request: EkRequest | DevIdRequest) -> dict[str, object]:
    """The request as the JSON object that a program is given."""
    pem = request.public_key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    specification, tpm, platform = request.specification, request.attributes, request.platform
    described: dict[str, object] = {
        "type": kind,
        "public_key": pem.decode(),
        "subject": request.subject,
        "tpm_specification": {
            "family": specification.family,
            "level": specification.level,
            "revision": specification.revision,
        },
        "tpm": {"manufacturer": tpm.manufacturer, "model": tpm.model, "version": tpm.version},
        "platform": {"manufacturer": platform.manufacturer, "model": platform.model, "version": platform.version},
    }
    if isinstance(request, EkRequest):
        described |= {"allow_signing": request.allow_signing, "decryption": request.decryption}
    else:
        ek_certificate = x509.load_der_x509_certificate(request.ek_certificate)
        described["ek_certificate"] = ek_certificate.public_bytes(Encoding.PEM).decode()
    return described


def _run(command: list[str], text: bytes) -> bytes:
    program = command[0]
    try:
        done = subprocess.run(command, check=False, input=text, capture_output=True, timeout=PROGRAM_TIMEOUT)
    except OSError as error:
        raise AuthorityError(f"{program} cannot be run: {error.strerror}", "name an executable file") from error
    except subprocess.TimeoutExpired as error:
        raise AuthorityError(
            f"{program} gave no certificate within {PROGRAM_TIMEOUT:.0f} s", "see what it waits for"
        ) from error
    if done.returncode:
        said = " ".join(done.stderr.decode(errors="replace").split())[-300:]
        raise AuthorityError(f"{program} ended with status {done.returncode}: {said}", "see what it says")
    return done.stdout


def _checked(der: bytes, wanted: KeyPublic, program: str) -> bytes:
    remedy = "it must print one certificate, PEM or DER, for the key that it was given"
    try:
        if len(der) > MAX_CERTIFICATE:
            raise ValueError
        certificate = x509.load_der_x509_certificate(der)
        issued_for = certificate.public_key()
    except ValueError as error:
        raise AuthorityError(f"{program} gave something that is no certificate", remedy) from error
    if issued_for != wanted:
        raise AuthorityError(f"{program} gave a certificate for another key", remedy)
    return der
