"""`crbd ca`: the certificate authority that certifies TPMs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from crbd.compat.localca_configuration import read_configuration
from crbd.compat.localca_signer import authority_files
from crbd.errors import AuthorityError, UsageError
from crbd.provision.authority import (
    AuthorityFiles,
    KeyKind,
    accept_certificate,
    default_directory,
    open_authority,
    request_certificate,
)

DESCRIPTION = "Look at, make and connect the certificate authority that certifies TPMs."
MAX_IMPORT = 1 << 20
"""Bytes of a certificate chain at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the operations and their arguments."""
    operations = parser.add_subparsers(required=True, metavar="OPERATION")
    show = _operation(operations, "show", _show, "print whose authority it is, its fingerprints and where it lies")
    show.add_argument("--json", action="store_true", help="as JSON")
    export = _operation(operations, "export", _export, "print its certificates in PEM: what verifiers trust")
    export.add_argument(
        "--part",
        choices=("chain", "root", "issuer"),
        default="chain",
        help="the whole chain, issuer first (default), or one end of it",
    )
    export.add_argument("--out", metavar="FILE", type=Path, help="write them there instead")
    create = _operation(operations, "create", _create, "make it now and not at first use; one that is there is kept")
    _add_key(create)
    request = _operation(operations, "request", _request, "make a key and print a CSR, for another authority to sign")
    _add_key(request)
    accept = _operation(operations, "import", _import, "take the certificate that was issued for the CSR")
    accept.add_argument("certificate", metavar="FILE", help="PEM: the certificate, then those above it; - for stdin")


def run(arguments: argparse.Namespace) -> int:
    """Do it; returns 0. Raises OperatorError."""
    operation: Any = arguments.operation
    operation(arguments, _files(arguments))
    return 0


def _operation(operations: Any, name: str, do: Any, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = operations.add_parser(name, help=text, allow_abbrev=False)
    parser.description = text[0].upper() + text[1:] + "."
    parser.set_defaults(operation=do)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ca-dir", metavar="DIR", type=Path, help=f"its directory (default: {default_directory()})")
    where.add_argument("--localca-conf", metavar="FILE", type=Path, help="the one that a swtpm-localca.conf names")
    return parser


def _add_key(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--key",
        choices=[kind.value for kind in KeyKind],
        default=KeyKind.ECC_P384.value,
        help="the kind of new keys (default: ecc-p384)",
    )


def _files(arguments: argparse.Namespace) -> AuthorityFiles:
    if arguments.localca_conf is not None:
        path: Path = arguments.localca_conf
        return authority_files(read_configuration(path, "config file"), path)
    kind = KeyKind(getattr(arguments, "key", KeyKind.ECC_P384.value))
    return AuthorityFiles.own(arguments.ca_dir or default_directory(), kind)


def _show(arguments: argparse.Namespace, files: AuthorityFiles) -> None:
    chain = open_authority(files, create=False).chain()
    if arguments.json:
        described = {
            "directory": str(files.directory),
            "signing_key": str(files.signing_key),
            "root_key": str(files.root_key) if os.path.exists(files.root_key) else None,
            "certificates": [_described(certificate) for certificate in chain],
        }
        print(json.dumps(described, indent=2))
        return
    print(f"{files.directory}: signing key {files.signing_key.name}")
    for certificate in chain:
        facts = _described(certificate)
        print(f"  {facts['subject']}, issued by {facts['issuer']}, {facts['key']}, until {facts['not_after']}")
        print(f"    SHA-256 {facts['sha256']}")


def _export(arguments: argparse.Namespace, files: AuthorityFiles) -> None:
    chain = open_authority(files, create=False).chain()
    if arguments.part == "issuer":
        chain = chain[:1]
    elif arguments.part == "root":
        chain = chain[-1:]
        if chain[0].issuer != chain[0].subject:
            raise AuthorityError(
                f"the root's certificate is not in {files.directory}", "import the chain with the root's at its end"
            )
    text = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in chain)
    if arguments.out is None:
        sys.stdout.write(text.decode())
        return
    try:
        arguments.out.write_bytes(text)
    except OSError as error:
        raise UsageError(f"--out {arguments.out}: {error.strerror}", "name a file that this user may write") from error


def _create(_: argparse.Namespace, files: AuthorityFiles) -> None:
    there = os.path.exists(files.issuer_certificate)
    open_authority(files)
    print(f"{files.directory}: {'there already' if there else 'made'}")


def _request(_: argparse.Namespace, files: AuthorityFiles) -> None:
    sys.stdout.write(request_certificate(files).decode())


def _import(arguments: argparse.Namespace, files: AuthorityFiles) -> None:
    name: str = arguments.certificate
    try:
        if name == "-":
            pem = sys.stdin.buffer.read(MAX_IMPORT)
        else:
            with open(name, "rb") as file:
                pem = file.read(MAX_IMPORT)
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}", "name a file that this user may read") from error
    accept_certificate(files, pem, name)
    print(f"{files.directory}: ready")


def _described(certificate: x509.Certificate) -> dict[str, str]:
    return {
        "subject": certificate.subject.rfc4514_string(),
        "issuer": certificate.issuer.rfc4514_string(),
        "serial_number": f"{certificate.serial_number:x}",
        "key": _key_name(certificate),
        "not_before": certificate.not_valid_before_utc.isoformat(),
        "not_after": certificate.not_valid_after_utc.isoformat(),
        "sha256": certificate.fingerprint(hashes.SHA256()).hex(),
    }


def _key_name(certificate: x509.Certificate) -> str:
    match certificate.public_key():
        case rsa.RSAPublicKey(key_size=size):
            return f"RSA {size}"
        case ec.EllipticCurvePublicKey(curve=curve):
            return f"ECC {curve.name}"
        case key:
            return type(key).__name__.removesuffix("PublicKey")
