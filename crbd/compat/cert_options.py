"""The options of swtpm_cert (0.11's, as far as certificates for TPM 2 need them) and what they mean.

swtpm_localca's options file holds options of this command too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from cryptography.x509.oid import NameOID

from crbd.compat.ioctl_options import Arguments, Complaint, Operand
from crbd.errors import UsageError
from crbd.provision.certificates import shortened

if TYPE_CHECKING:
    from crbd.provision.signing import KeyPublic

WITH_VALUE: Final = (
    *("pubkey", "modulus", "ecc-x", "ecc-y", "ecc-curveid", "exponent", "public", "keyalgo"),
    *("signkey", "signkey-password", "signkey-pwd", "issuercert", "out-cert", "subject", "days", "serial", "type"),
    *("tpm-manufacturer", "tpm-model", "tpm-version", "tpm-serial-num"),
    *("platform-manufacturer", "platform-model", "platform-version"),
    *("tpm-spec-family", "tpm-spec-level", "tpm-spec-revision"),
)
FLAGS: Final = (*("pem", "add-header", "tpm2", "allow-signing", "decryption", "print-capabilities", "version", "help"),)
NAMES: Final = {**dict.fromkeys(WITH_VALUE, True), **dict.fromkeys(FLAGS, False)}
"""Every option, and whether it takes a value."""
KINDS: Final = ("ek", "platform", "iak", "idevid")
CURVES: Final[dict[str, type[ec.EllipticCurve]]] = {
    "secp256r1": ec.SECP256R1,
    "secp384r1": ec.SECP384R1,
    "secp521r1": ec.SECP521R1,
}
MAX_HEX: Final = 10 * 1024
"""Hexadecimal digits of a key part at most (swtpm's figure)."""
MAX_PASSWORD: Final = 255
"""Bytes of a password in a file at most (swtpm's figure)."""
_SERIAL_BITS: Final = 160
_LARGEST_UNSIGNED: Final = 0xFFFFFFFF
_NAME_ATTRIBUTES: Final = {
    "CN": NameOID.COMMON_NAME,
    "commonName": NameOID.COMMON_NAME,
    "C": NameOID.COUNTRY_NAME,
    "ST": NameOID.STATE_OR_PROVINCE_NAME,
    "L": NameOID.LOCALITY_NAME,
    "O": NameOID.ORGANIZATION_NAME,
    "OU": NameOID.ORGANIZATIONAL_UNIT_NAME,
    "street": NameOID.STREET_ADDRESS,
    "DC": NameOID.DOMAIN_COMPONENT,
    "UID": NameOID.USER_ID,
    "SN": NameOID.SURNAME,
    "GN": NameOID.GIVEN_NAME,
    "title": NameOID.TITLE,
    "serialNumber": NameOID.SERIAL_NUMBER,
    "emailAddress": NameOID.EMAIL_ADDRESS,
    "dnQualifier": NameOID.DN_QUALIFIER,
}
_DOTTED: Final = re.compile(r"[012](\.[0-9]+)+")


@dataclass(frozen=True, slots=True)
class CertificateOptions:
    """A command line's options: the last of each counts."""

    values: dict[str, str]
    flags: frozenset[str]

    def __getitem__(self, name: str) -> str:
        """The option's value, empty where it was not given."""
        return self.values.get(name, "")

    @property
    def kind(self) -> str:
        """One of KINDS."""
        return self.values.get("type", "ek").lower()

    def number(self, name: str, largest: int = _LARGEST_UNSIGNED) -> int:
        """An option's value as C's strtol reads it. Raises UsageError."""
        number = _long(self[name], f"--{name}")
        if not 0 <= number <= largest:
            raise UsageError(f"--{name} is outside valid range.")
        return number


class HelpWantedError(UsageError):
    """The command line is wrong, and usage is to be shown."""


def parse(arguments: Sequence[str]) -> CertificateOptions:
    """Raises UsageError; HelpWantedError where getopt finds fault with an option."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    for argument in Arguments(arguments, NAMES):
        if isinstance(argument, Complaint):
            raise HelpWantedError(f"swtpm_cert: {argument.text}")
        if isinstance(argument, Operand):
            continue
        if NAMES[argument.name]:
            values[argument.name] = argument.value
        else:
            flags.add(argument.name)
            if argument.name in ("print-capabilities", "version", "help"):
                break
    options = CertificateOptions(values, frozenset(flags))
    if options.kind not in KINDS:
        raise UsageError(f"Unknown certificate type '{options['type']}'.")
    return options


def check(options: CertificateOptions) -> None:
    """See that what the type of certificate needs is there. Raises UsageError."""
    if "public" in options.values or "keyalgo" in options.values:
        raise UsageError(f"Unsupported key type '{options['keyalgo']}'.")
    if "tpm2" not in options.flags:
        raise UsageError("A certificate for a TPM 1.2 needs a SHA-1 signature, which is not made any more. Use --tpm2.")
    needed: list[tuple[str, ...]] = []
    if options.kind in ("ek", "platform"):
        needed.append(("tpm-manufacturer", "tpm-model", "tpm-version"))
    match options.kind:
        case "ek":
            needed.append(("tpm-spec-family", "tpm-spec-level", "tpm-spec-revision"))
        case "platform":
            needed.append(("platform-manufacturer", "platform-model", "platform-version"))
        case _:
            needed.append(("tpm-serial-num",))
    for group in needed:
        if any(name not in options.values for name in group):
            names = " and ".join(f"--{name}" for name in group)
            raise UsageError(f"{names} must {'all ' if len(group) > 1 else ''}be provided.")


def public_key(options: CertificateOptions) -> KeyPublic:
    """The key to certify. Raises UsageError."""
    values = options.values
    forms = [name for name in ("pubkey", "modulus", "ecc-x") if name in values]
    if ("ecc-x" in values) != ("ecc-y" in values):
        raise UsageError("ECC x and y parameters must both be given.")
    if not forms:
        raise UsageError("No parameters for a public key were given.")
    if len(forms) > 1:
        raise UsageError(f"Only one public key may be given, not --{' and --'.join(forms)}.")
    try:
        match forms[0]:
            case "pubkey":
                return _public_key_in(Path(values["pubkey"]))
            case "modulus":
                exponent = options.number("exponent") if "exponent" in values else 65537
                return rsa.RSAPublicNumbers(exponent, _hex(values["modulus"])).public_key()
        return _curve_point(options)
    except ValueError as error:
        raise UsageError(f"The public key is not usable: {error}") from error


def subject(text: str) -> x509.Name:
    """A name from `C=US,ST=NY,CN=…`. Raises UsageError for an attribute that is not known."""
    attributes = []
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            continue
        oid = _NAME_ATTRIBUTES.get(name)
        if oid is None and _DOTTED.fullmatch(name):
            oid = x509.ObjectIdentifier(name)
        if oid is None:
            raise UsageError(f"The subject has an unknown attribute '{name}'.")
        try:
            attributes.append(x509.NameAttribute(oid, shortened(value)))
        except ValueError as error:
            raise UsageError(f"The subject's {name} is not usable: {error}") from error
    return x509.Name(attributes)


def serial(text: str) -> int:
    """A serial number of 20 bytes at most, above zero. Raises UsageError."""
    try:
        number = int(text)
    except ValueError as error:
        raise UsageError("Serial number is invalid.") from error
    if number < 1:
        raise UsageError("Serial number is invalid.")
    if number.bit_length() >= _SERIAL_BITS:
        raise UsageError("Serial number is too large.")
    return number


def signing_password(options: CertificateOptions) -> bytes | None:
    """The signing key's password: --signkey-pwd, else --signkey-password. Raises UsageError."""
    if "signkey-pwd" not in options.values:
        text = options.values.get("signkey-password")
        return None if text is None else os.fsencode(text)
    kind, colon, rest = options["signkey-pwd"].partition(":")
    try:
        match kind if colon else "":
            case "pass":
                return os.fsencode(rest)
            case "env":
                return os.environb[os.fsencode(rest)]
            case "file":
                with open(rest, "rb") as file:
                    return file.read(MAX_PASSWORD)
            case "fd":
                with open(int(rest), "rb", buffering=0) as file:
                    return file.read(MAX_PASSWORD)
    except KeyError as error:
        raise UsageError("Could not get password from environment variable.") from error
    except ValueError as error:
        raise UsageError("Bad file descriptor for password.") from error
    except OSError as error:
        raise UsageError(f"Could not read password from {kind}:{rest}: {error.strerror}") from error
    return os.fsencode(options["signkey-pwd"])


def days(options: CertificateOptions) -> int:
    """Days of validity; -1 is without end. Raises UsageError."""
    number = _long(options.values.get("days", "365"), "the number of days")
    if not -1 <= number <= 0x7FFFFFFF:
        raise UsageError(f"Days value of '{options['days']}' is outside valid range.")
    return number


def _public_key_in(path: Path) -> KeyPublic:
    try:
        key = load_pem_public_key(path.read_bytes())
    except OSError as error:
        raise UsageError(f"Could not open public key file {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"Could not read PEM public key from {path}.") from error
    if not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise UsageError(f"The public key in {path} is neither RSA nor ECC.")
    return key


def _curve_point(options: CertificateOptions) -> ec.EllipticCurvePublicKey:
    name = options["ecc-curveid"] or "secp256r1"
    if name not in CURVES:
        raise UsageError(f"Unsupported ECC curve id: {name}")
    return ec.EllipticCurvePublicNumbers(_hex(options["ecc-x"]), _hex(options["ecc-y"]), CURVES[name]()).public_key()


def _hex(text: str) -> int:
    if len(text) > MAX_HEX:
        raise UsageError(f"Unreasonably long hex string of {len(text)} bytes.")
    if len(text) % 2:
        raise UsageError(f"Got an odd number of hex digits ({len(text)}).")
    if not re.fullmatch("[0-9A-Fa-f]+", text):
        raise UsageError(f"Illegal hex digits in '{text}'.")
    return int(text, 16)


def _long(text: str, what: str) -> int:
    """A whole number as strtol with base 0 reads it: decimal, 0x… or 0… (octal)."""
    found = re.fullmatch(r"\s*([+-]?)(0[xX][0-9A-Fa-f]+|[0-9]+)", text)
    if found is None:
        raise UsageError(f"Could not parse {what} '{text}'.")
    sign, digits = found.groups()
    octal = len(digits) > 1 and digits[0] == "0" and digits[1] not in "xX"
    try:
        number = int(digits, 8 if octal else 0)
    except ValueError as error:
        raise UsageError(f"Could not parse {what} '{text}'.") from error
    return -number if sign == "-" else number
