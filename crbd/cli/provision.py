"""`crbd provision`: make a TPM ready for its guest, as a factory does."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any
from uuid import UUID

from crbd.cli.state_options import add_keys, add_library, engine_maker, keys_of
from crbd.cli.swtpm_key import read_swtpm_key
from crbd.errors import UsageError
from crbd.provision.options import Existing, KeyAlgorithm, ProvisionOptions
from crbd.provision.provisioning import provision
from crbd.provision.report import ProvisionReport
from crbd.provision.signers import open_signer
from crbd.provision.signing import CertificateSigner, PlatformAttributes
from crbd.state.keys import UserKey
from crbd.store.document import NewTpm
from crbd.store.layout import Layout, open_state
from crbd.store.port import Store

DESCRIPTION = """Make a TPM with endorsement keys, their certificates and the PCR banks that are wanted, ready for its
guest. Everything is made in memory and stored at once at the end: a run that is interrupted leaves what was there
before."""

_ALGORITHMS = [algorithm.value for algorithm in KeyAlgorithm]
_CERTIFICATES = ("ek", "platform")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `crbd provision`."""
    _add_state(parser)
    keys = parser.add_argument_group("keys: " + ", ".join(_ALGORITHMS))
    keys.add_argument(
        "--ek",
        metavar="LIST",
        default="rsa2048,ecc_nist_p384",
        help="endorsement keys, comma-separated, or none (default: rsa2048,ecc_nist_p384)",
    )
    keys.add_argument(
        "--high-range", action="store_true", help="make rsa2048 and ecc_nist_p256 EKs by the high-range templates"
    )
    keys.add_argument(
        "--allow-signing", action="store_true", help="EKs that may sign: no standard EKs; their templates go into NV"
    )
    keys.add_argument("--decryption", action="store_true", help="with --allow-signing: EKs that may decrypt too")
    keys.add_argument("--srk", metavar="ALG", choices=_ALGORITHMS, help="make a storage root key too")
    keys.add_argument("--iak", metavar="ALG", choices=_ALGORITHMS, help="make an initial attestation key too")
    keys.add_argument("--idevid", metavar="ALG", choices=_ALGORITHMS, help="make a device identity key too")
    certificates = parser.add_argument_group("certificates")
    certificates.add_argument(
        "--certificates",
        metavar="LIST",
        default="ek,platform",
        help="which to store in NV: ek, platform, both or none (default: ek,platform)",
    )
    certificates.add_argument(
        "--signer", metavar="SIGNER", default="local", help="who signs: local (default), exec:PROGRAM or tool:PROGRAM"
    )
    certificates.add_argument("--ca-dir", metavar="DIR", type=Path, help="directory of the local authority")
    certificates.add_argument("--ca-url", metavar="URL", default="", help="where the issuer's certificate is published")
    certificates.add_argument("--subject", metavar="TEXT", default="", help="whose TPM it is, for the subjects")
    platform = PlatformAttributes()
    for part in ("manufacturer", "model", "version"):
        certificates.add_argument(f"--platform-{part}", metavar="TEXT", default=getattr(platform, part))
    certificates.add_argument("--lock-nvram", action="store_true", help="write-lock the certificates for good")
    certificates.add_argument(
        "--write-ek-cert-files", metavar="DIR", type=Path, help="put copies of the keys' certificates there, in DER"
    )
    parser.add_argument(
        "--pcr-banks",
        metavar="LIST",
        default="sha256",
        help="PCR banks to be active, comma-separated; - leaves them as they are (default: sha256)",
    )
    parser.add_argument("--profile", metavar="JSON", help="profile of a new TPM (libtpms 0.10 and later)")
    parser.add_argument(
        "--existing",
        choices=[existing.value for existing in Existing],
        default=Existing.REFUSE.value,
        help="what to do where a TPM is: refuse (default), keep it as it is, complete what it lacks, replace it by a "
        "new one, or reconfigure its PCR banks alone",
    )
    parser.add_argument("--json", action="store_true", help="say as JSON what was done")
    add_library(parser)


def _add_state(parser: argparse.ArgumentParser) -> None:
    where = parser.add_argument_group("state")
    where.add_argument(
        "--state", metavar="DIR", type=Path, required=True, help="directory for the TPM's state, or swtpm's linear file"
    )
    where.add_argument(
        "--layout", choices=[layout.value for layout in Layout], help="layout of new state (default: crbd)"
    )
    where.add_argument("--name", default="", help="what a new TPM is called, for people")
    where.add_argument("--uuid", type=UUID, help="the instance that DIR must hold, or that is made")
    where.add_argument("--swtpm-key", metavar="KEY", help="key of state in swtpm's layouts, as swtpm's --key has it")
    add_keys(parser)


def run(arguments: argparse.Namespace) -> int:
    """Provision, say what was done, return 0. Raises OperatorError; the state is as before then."""
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="crbd: %(levelname)s: %(message)s")
    options = _options(arguments)
    path: Path = arguments.state
    with keys_of(arguments) as keys:
        store = _open(arguments, keys, create=options.existing is not Existing.RECONFIGURE)
        try:
            report = provision(
                store,
                options,
                _signer(arguments, options),
                engine_maker(arguments),
                directory=path if path.is_dir() else None,
            )
        finally:
            store.close()
    print(json.dumps(_json(report), indent=2) if arguments.json else "\n".join(_lines(report, path)))
    return 0


def _open(arguments: argparse.Namespace, keys: tuple[UserKey, ...], *, create: bool) -> Store:
    return open_state(
        arguments.state,
        create=create,
        layout=None if arguments.layout is None else Layout(arguments.layout),
        new=NewTpm(arguments.name, keys),
        swtpm_key=None if arguments.swtpm_key is None else read_swtpm_key(arguments.swtpm_key, "--swtpm-key"),
        uuid=arguments.uuid,
    )


def _signer(arguments: argparse.Namespace, options: ProvisionOptions) -> CertificateSigner | None:
    if not (options.ek_certificates or options.platform_certificate):
        return None
    return open_signer(arguments.signer, arguments.ca_dir, arguments.ca_url)


def _options(arguments: argparse.Namespace) -> ProvisionOptions:
    """Raises UsageError."""
    if arguments.decryption and not arguments.allow_signing:
        raise UsageError("--decryption is what EKs are for unless --allow-signing is given", "leave it out")
    existing = Existing(arguments.existing)
    certificates = _list(arguments.certificates, "--certificates", _CERTIFICATES)
    if existing is Existing.RECONFIGURE:
        certificates = []
    return ProvisionOptions(
        endorsement_keys=tuple(KeyAlgorithm(word) for word in _list(arguments.ek, "--ek", _ALGORITHMS)),
        high_range=arguments.high_range,
        allow_signing=arguments.allow_signing,
        decryption=arguments.decryption or not arguments.allow_signing,
        storage_key=_algorithm(arguments.srk),
        attestation_key=_algorithm(arguments.iak),
        device_identity_key=_algorithm(arguments.idevid),
        ek_certificates="ek" in certificates,
        platform_certificate="platform" in certificates,
        lock_nvram=arguments.lock_nvram,
        pcr_banks=None if arguments.pcr_banks == "-" else tuple(filter(None, arguments.pcr_banks.split(","))),
        profile=arguments.profile,
        subject=arguments.subject,
        platform=PlatformAttributes(
            arguments.platform_manufacturer, arguments.platform_model, arguments.platform_version
        ),
        existing=existing,
        certificate_directory=arguments.write_ek_cert_files,
    )


def _list(text: str, option: str, known: list[str] | tuple[str, ...]) -> list[str]:
    """The words of a comma-separated list, `none` for none. Raises UsageError for one that is not known."""
    if text == "none":
        return []
    words = text.split(",")
    for word in words:
        if word not in known:
            raise UsageError(f"{option}: there is no {word!r}", f"it takes {', '.join(known)} or none")
    return words


def _algorithm(text: str | None) -> KeyAlgorithm | None:
    return None if text is None else KeyAlgorithm(text)


def _json(report: ProvisionReport) -> dict[str, Any]:
    return {
        "outcome": report.outcome.value,
        "keys": [
            {
                "role": key.role,
                "algorithm": key.algorithm,
                "handle": f"0x{key.handle:08x}",
                "fingerprint": key.fingerprint,
                "new": key.new,
            }
            for key in report.keys
        ],
        "nv_indices": [
            {
                "index": f"0x{index.index:08x}",
                "what": index.what,
                "size": index.size,
                "locked": index.locked,
                "new": index.new,
            }
            for index in report.indices
        ],
        "pcr_banks": {"active": report.active_banks, "available": report.available_banks},
        "profile": report.profile or None,
        "files": [str(path) for path in report.files],
        "notes": report.notes,
    }


def _lines(report: ProvisionReport, path: Path) -> list[str]:
    lines = [f"{path}: {note}" for note in report.notes]
    lines.append(f"{path}: {report.outcome.value}")
    for key in report.keys:
        lines.append(f"  {key.role} {key.algorithm} at 0x{key.handle:08x}{_there(new=key.new)}")
    for index in report.indices:
        locked = ", locked" if index.locked else ""
        lines.append(f"  {index.what} at 0x{index.index:08x}, {index.size} bytes{locked}{_there(new=index.new)}")
    if report.active_banks:
        lines.append(f"  PCR banks {', '.join(report.active_banks)} of {', '.join(report.available_banks)}")
    lines += [f"  {file}" for file in report.files]
    return lines


def _there(*, new: bool) -> str:
    return "" if new else " (was there)"
