"""What swtpm_localca does, as a signer: an authority and options from its configuration files.

swtpm_setup uses it in its own process where its configuration names swtpm_localca, so that no program is started for
a certificate. The files (keys, certificates, counted serial numbers, lock) are those that swtpm's would use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from crbd.compat import cert, cert_options
from crbd.compat.localca_configuration import (
    LOCALCA_FILE,
    OPTIONS_FILE,
    Configuration,
    default_file,
    read_configuration,
    read_options,
)
from crbd.compat.setup_log import Log
from crbd.errors import AuthorityError, UsageError
from crbd.provision.authority import (
    AuthorityFiles,
    KeyKind,
    LocalAuthority,
    default_directory,
    open_authority,
    open_token_authority,
)
from crbd.provision.certificates import serial_number_of_tpm
from crbd.provision.signers import key_parameters
from crbd.provision.signing import DevIdRequest, EkRequest, PlatformAttributes
from crbd.provision.tokens import PIN_VARIABLE, SCHEME

DEFAULT_PIN: Final = "swtpm-tpmca"
"""Of a token that the configuration names no PIN for: swtpm-create-tpmca's."""
_POINT: Final = re.compile(r"x=([0-9A-Fa-f]+),y=([0-9A-Fa-f]+)(?:,id=([^,]+))?")
_DEFAULT_PLATFORM: Final = PlatformAttributes()


class LocalcaSigner:
    """A `CertificateSigner` and `DevIdSigner`. `options` are swtpm_cert's, for all certificates."""

    def __init__(self, authority: LocalAuthority, options: Sequence[str], log: Log) -> None:
        self._authority = authority
        self._options = list(options)
        self._log = log

    def ek_certificate(self, request: EkRequest) -> bytes:
        """DER of the endorsement key's certificate. Raises OperatorError."""
        return self.issue("ek", key_parameters(request.public_key), request.subject, _ek_options(request))

    def platform_certificate(self, request: EkRequest) -> bytes:
        """DER of the platform certificate. Raises OperatorError."""
        return self.issue("platform", key_parameters(request.public_key), request.subject, _described(request))

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        """DER of the IAK's or IDevID's certificate. Raises OperatorError."""
        try:
            serial_number = serial_number_of_tpm(request.attributes, request.ek_certificate)
        except ValueError as error:
            raise AuthorityError(str(error), "have the EK certified by an authority with a key identifier") from error
        options = ["--tpm-serial-num", serial_number, *_described(request)]
        return self.issue(request.kind.value, key_parameters(request.public_key), request.subject, options)

    def issue(self, kind: str, key: str, machine: str, options: Sequence[str]) -> bytes:
        """A certificate of `kind` for `key` (swtpm_localca's --ek). Raises OperatorError."""
        parsed = cert_options.parse(
            [
                *("--subject", f"{'CN' if kind in ('ek', 'platform') else 'serialNumber'}={_usable(machine)}"),
                *self._options,
                *_key_options(key),
                *("--type", kind, "--days", "-1", "--tpm2"),
                *options,
            ]
        )
        der = cert.issue(parsed, self._authority.issuer, self._authority.next_terms().serial)
        self._log.say(f"Successfully created {'EK' if kind == 'ek' else kind} certificate locally.")
        return der


def open_localca(configuration: str, options: str, log: Log) -> LocalcaSigner:
    """The authority of swtpm_localca's configuration file and the options of its options file, each empty for the
    default. Where there is no configuration file at all, it is crbd's own authority. Raises OperatorError.
    """
    path = Path(configuration) if configuration else default_file(LOCALCA_FILE)
    named = configuration or os.path.exists(path)
    settings = read_configuration(path, "config file") if named else Configuration("")
    options_path = Path(options) if options else default_file(OPTIONS_FILE)
    words = read_options(options_path, "options file") if options or os.path.exists(options_path) else []
    platform = _platform_options(_DEFAULT_PLATFORM)
    if settings["signingkey"].startswith(SCHEME):
        return LocalcaSigner(_token_authority(settings, path), [*platform, *words], log)
    files = authority_files(settings, path) if named else AuthorityFiles.own(default_directory())
    if not os.path.exists(files.issuer_certificate):
        log.say("Creating root CA and a local CA's signing key and issuer cert.")
    return LocalcaSigner(open_authority(files), [*platform, *words], log)


def _token_authority(settings: Configuration, path: Path) -> LocalAuthority:
    """The authority of a configuration whose signing key is in a PKCS#11 token. Raises UsageError, AuthorityError."""
    # For the PKCS#11 module, which reads its own settings from the environment of this process.
    os.environ.update(settings.environment)
    pin = settings["signingkey_password"] or settings[PIN_VARIABLE] or os.environ.get(PIN_VARIABLE, DEFAULT_PIN)
    os.environ[PIN_VARIABLE] = pin
    uri = settings["signingkey"].replace("\\;", ";")
    return open_token_authority(authority_files(settings, path), uri)


def authority_files(configuration: Configuration, path: Path) -> AuthorityFiles:
    """Where swtpm_localca's configuration puts the authority. Raises UsageError."""
    for name in ("statedir", "signingkey", "issuercert"):
        if not configuration[name]:
            raise UsageError(f"Missing '{name}' config value in config file {path}.")
    directory, key = Path(configuration["statedir"]), configuration["signingkey"]
    password, root_password = configuration["signingkey_password"], os.environ.get("SWTPM_ROOTCA_PASSWORD")
    signing_key = Path(key)
    files = AuthorityFiles.own(directory, KeyKind.RSA_3072)
    return replace(
        files,
        signing_key=signing_key,
        issuer_certificate=Path(configuration["issuercert"]),
        root_key=signing_key.parent / "swtpm-localca-rootca-privkey.pem",
        root_certificate=signing_key.parent / "swtpm-localca-rootca-cert.pem",
        lock=directory / ".lock.swtpm-localca",
        serial=Path(configuration["certserial"] or directory / "certserial"),
        root_name="swtpm-localca-rootca",
        issuer_name="swtpm-localca",
        signing_password=os.fsencode(password) if password else None,
        root_password=os.fsencode(root_password) if root_password else None,
    )


def _ek_options(request: EkRequest) -> list[str]:
    options = _described(request)
    if request.allow_signing:
        options.append("--allow-signing")
        if request.decryption:
            options.append("--decryption")
    return options


def _described(request: EkRequest | DevIdRequest) -> list[str]:
    """What the TPM says of itself; and the platform, where it is not the one that is assumed anyway."""
    specification, tpm = request.specification, request.attributes
    options = [
        *("--tpm-spec-family", specification.family, "--tpm-spec-level", str(specification.level)),
        *("--tpm-spec-revision", str(specification.revision), "--tpm-manufacturer", tpm.manufacturer),
        *("--tpm-model", tpm.model, "--tpm-version", tpm.version),
    ]
    if request.platform != _DEFAULT_PLATFORM:
        options += _platform_options(request.platform)
    return options


def _platform_options(platform: PlatformAttributes) -> list[str]:
    return [
        *("--platform-manufacturer", platform.manufacturer, "--platform-model", platform.model),
        *("--platform-version", platform.version),
    ]


def _key_options(key: str) -> list[str]:
    if found := _POINT.search(key):
        x, y, curve = found.groups()
        return ["--ecc-x", x, "--ecc-y", y, *(["--ecc-curveid", curve] if curve else [])]
    return ["--modulus", key]


def _usable(machine: str) -> str:
    """A machine's name as the subject's value: a comma would end it, and swtpm_localca replaces `+` too."""
    return re.sub(r"(?<!\\)\+|,", "_", machine) or "unknown"
