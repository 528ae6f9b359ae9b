"""`crbd ek show`: a TPM's endorsement keys and their certificates, without a guest."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

from crbd.cli.state_options import add_keys, add_library, engine_maker, keys_of
from crbd.cli.swtpm_key import read_swtpm_key
from crbd.provision.endorsement import Identities, ShownCertificate, ShownKey, read_identities
from crbd.store.document import NewTpm
from crbd.store.layout import open_state

DESCRIPTION = "Look at the endorsement keys of a TPM."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the operations and their arguments."""
    operations = parser.add_subparsers(required=True, metavar="OPERATION")
    show = operations.add_parser("show", help="print the keys and certificates", allow_abbrev=False)
    show.description = """Print the endorsement keys and device identity keys that a TPM holds persistently, and the
    certificates in its NV. The state is read and not changed; a daemon may have it at the time."""
    show.add_argument("state", metavar="STATE", type=Path, help="directory that holds the TPM's state, or linear file")
    form = show.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="as JSON")
    form.add_argument("--pem", action="store_true", help="the certificates, and the keys that have none, as PEM")
    add_keys(show)
    show.add_argument("--swtpm-key", metavar="KEY", help="key of state in swtpm's layouts, as swtpm's --key has it")
    add_library(show)


def run(arguments: argparse.Namespace) -> int:
    """Show; returns 0. Raises OperatorError."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="crbd: %(levelname)s: %(message)s")
    swtpm_key = None if arguments.swtpm_key is None else read_swtpm_key(arguments.swtpm_key, "--swtpm-key")
    with keys_of(arguments) as keys:
        store = open_state(arguments.state, create=False, new=NewTpm("", keys), swtpm_key=swtpm_key, lock=False)
        try:
            found = read_identities(store, engine_maker(arguments))
        finally:
            store.close()
    if arguments.json:
        print(json.dumps(_json(found), indent=2))
    elif arguments.pem:
        sys.stdout.write(_pem(found))
    else:
        print("\n".join(_lines(found)))
    return 0


def _json(found: Identities) -> dict[str, Any]:
    return {
        "keys": [_json_key(key) for key in found.keys],
        "certificates": [_json_certificate(certificate) for certificate in found.certificates],
        "unreadable": [f"0x{index:08x}" for index in found.unreadable],
    }


def _json_key(key: ShownKey) -> dict[str, Any]:
    return {
        "role": key.role,
        "handle": f"0x{key.handle:08x}",
        "algorithm": key.algorithm,
        "fingerprint": key.public.fingerprint,
        "spki_fingerprint": key.spki_fingerprint,
        "pem": key.pem,
    }


def _json_certificate(certificate: ShownCertificate) -> dict[str, Any]:
    parsed = certificate.parsed
    return {
        "index": f"0x{certificate.index:08x}",
        "key": None if certificate.handle is None else f"0x{certificate.handle:08x}",
        "subject": parsed.subject.rfc4514_string(),
        "issuer": parsed.issuer.rfc4514_string(),
        "serial": f"{parsed.serial_number:x}",
        "not_before": parsed.not_valid_before_utc.isoformat(),
        "not_after": parsed.not_valid_after_utc.isoformat(),
        "sha256": hashlib.sha256(certificate.der).hexdigest(),
        "pem": certificate.pem,
    }


def _pem(found: Identities) -> str:
    certified = {certificate.handle for certificate in found.certificates}
    return "".join(
        [
            *(key.pem for key in found.keys if key.handle not in certified),
            *(certificate.pem for certificate in found.certificates),
        ]
    )


def _lines(found: Identities) -> list[str]:
    lines = []
    for key in found.keys:
        lines.append(f"{key.role} 0x{key.handle:08x}, {key.algorithm}, fingerprint {key.public.fingerprint}")
        lines += [f"  {_line(certificate)}" for certificate in found.certificates if certificate.handle == key.handle]
    lines += [_line(certificate) for certificate in found.certificates if certificate.handle is None]
    lines += [f"NV 0x{index:08x}: only a guest may read it" for index in found.unreadable]
    return lines or ["no endorsement key is persistent, and there is no certificate"]


def _line(certificate: ShownCertificate) -> str:
    parsed = certificate.parsed
    until = parsed.not_valid_after_utc.date().isoformat()
    return (
        f"certificate 0x{certificate.index:08x}, {parsed.subject.rfc4514_string() or '(no subject)'}, "
        f"issued by {parsed.issuer.rfc4514_string()}, until {until}"
    )
