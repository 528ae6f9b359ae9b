"""`swtpm_cert`: certificates of a TPM from a public key, a signing key and its certificate.

Options and exit status are those of swtpm 0.11, without certificates for TPM 1.2 and for ML-KEM and ML-DSA keys.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from crbd.compat import cert_options
from crbd.compat.cert_options import CertificateOptions, HelpWantedError
from crbd.errors import AuthorityError, OperatorError, UsageError
from crbd.provision.authority import load_certificates, load_signing_key
from crbd.provision.certificates import (
    NO_EXPIRY,
    Issuer,
    Terms,
    devid_certificate,
    ek_certificate,
    platform_certificate,
)
from crbd.provision.signing import (
    DevIdKind,
    DevIdRequest,
    EkRequest,
    PlatformAttributes,
    Specification,
    TpmAttributes,
)
from crbd.provision.tokens import SCHEME, TokenUri, open_token_key

RELEASE: Final = "0.11.0"
"""The release of swtpm whose options these are."""
VERSION: Final = f"TPM certificate tool version {RELEASE}, of crbd\n"
CAPABILITIES: Final = {
    "type": "swtpm_cert",
    "features": ["cmdarg-signkey-pwd", "cmdarg-tpm-serial-num", "supports-iak-idevid"],
    "version": RELEASE,
}
HELP: Final = (
    VERSION
    + """
Usage: swtpm_cert [options]

Certify a TPM's key; its private part is not needed.

Which key:
--pubkey <file>           : PEM file of the public key
--modulus <hex>           : modulus of an RSA key
--exponent <number>       : its exponent; default 65537
--ecc-x <hex>             : x of an ECC key
--ecc-y <hex>             : y of an ECC key
--ecc-curveid <curve>     : secp256r1 (default), secp384r1 or secp521r1

Who signs:
--signkey <file>          : PEM file of the signing key, or its PKCS#11 URI (SWTPM_PKCS11_PIN: its PIN)
--signkey-password <text> : its password
--signkey-pwd <source>    : its password from pass:TEXT, file:PATH, fd:NUMBER or env:NAME
--issuercert <file>       : PEM file of the signing key's certificate

The certificate:
--type <type>             : ek (default), platform, iak or idevid
--out-cert <file>         : where it is written
--pem                     : in PEM form; DER otherwise
--serial <number>         : serial number; default 1
--days <number>           : days of validity, -1 for no end; default 365
--subject <name>          : C=US,ST=NY,CN=name
--tpm-manufacturer <text>, --tpm-model <text>, --tpm-version <text>
--tpm-serial-num <text>   : for types iak and idevid
--platform-manufacturer <text>, --platform-model <text>, --platform-version <text>
--tpm-spec-family <text>, --tpm-spec-level <number>, --tpm-spec-revision <number>
--tpm2                    : for a TPM 2; needed
--allow-signing           : the EK can sign
--decryption              : the EK can decrypt; the default without --allow-signing

--print-capabilities      : print what this program can do, as JSON
--version
--help
"""
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 1 with the reason on stderr."""
    arguments = sys.argv[1:] if argv is None else argv
    try:
        options = cert_options.parse(arguments)
        if _told(options):
            return 0
        _write(options, issue(options, _issuer(options)))
    except HelpWantedError as error:
        print(error, file=sys.stderr)
        sys.stdout.write(HELP)
        return 1
    except OperatorError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def issue(options: CertificateOptions, issuer: Issuer, serial: int | None = None) -> bytes:
    """DER of the certificate that the options describe; `serial` stands in place of theirs. Raises UsageError."""
    cert_options.check(options)
    key = cert_options.public_key(options)
    if serial is None:
        serial = cert_options.serial(options.values.get("serial", "1"))
    terms = Terms(serial, cert_options.subject(options["subject"]), _not_after(cert_options.days(options)))
    tpm = TpmAttributes(options["tpm-manufacturer"], options["tpm-model"], options["tpm-version"])
    platform = PlatformAttributes(
        options["platform-manufacturer"], options["platform-model"], options["platform-version"]
    )
    specification = Specification()
    if "tpm-spec-family" in options.values:
        revision = options.number("tpm-spec-revision")
        specification = Specification(options["tpm-spec-family"], options.number("tpm-spec-level"), revision)
    if options.kind in ("iak", "idevid"):
        device = DevIdRequest(DevIdKind(options.kind), key, "", specification, tpm, platform, b"")
        return devid_certificate(device, issuer, terms, options["tpm-serial-num"])
    signs, decrypts = "allow-signing" in options.flags, "decryption" in options.flags
    request = EkRequest(key, "", specification, tpm, platform, allow_signing=signs, decryption=decrypts or not signs)
    return (ek_certificate if options.kind == "ek" else platform_certificate)(request, issuer, terms)


def _told(options: CertificateOptions) -> bool:
    """Whether the command line only asks for a text, which is printed."""
    if "help" in options.flags:
        sys.stdout.write(HELP)
    elif "version" in options.flags:
        sys.stdout.write(VERSION)
    elif "print-capabilities" in options.flags:
        print(json.dumps(CAPABILITIES))
    else:
        return False
    return True


def _issuer(options: CertificateOptions) -> Issuer:
    if "issuercert" not in options.values:
        raise UsageError("The issuer certificate name is required.")
    if "signkey" not in options.values:
        raise UsageError("Missing signature key.")
    certificate = load_certificates(Path(options["issuercert"]))[0]
    name = options["signkey"]
    if name.startswith(SCHEME):
        return Issuer(certificate, open_token_key(TokenUri.parse(name), certificate))
    return Issuer(certificate, load_signing_key(Path(name), cert_options.signing_password(options)))


def _not_after(days: int) -> dt.datetime:
    if days < 0:
        return NO_EXPIRY
    try:
        return dt.datetime.now(dt.UTC) + dt.timedelta(days)
    except OverflowError as error:
        raise UsageError(f"Days '{days}' may be too far in the future.") from error


def _write(options: CertificateOptions, der: bytes) -> None:
    pem = x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) if "pem" in options.flags else b""
    if "out-cert" not in options.values:
        sys.stdout.write(pem.decode())
        return
    write_certificate(Path(options["out-cert"]), pem or der)


def write_certificate(path: Path, data: bytes) -> None:
    """Write a certificate file (0600), but through no symbolic link. Raises AuthorityError."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)
    except OSError as error:
        raise AuthorityError(f"Could not open {path} for writing the certificate: {error.strerror}") from error
