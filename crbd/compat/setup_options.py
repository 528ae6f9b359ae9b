"""The options of swtpm_setup (0.11's; those for a TPM 1.2 are known, and refused by what needs one)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from crbd.compat.ioctl_options import Arguments, Complaint, Operand
from crbd.errors import UsageError
from crbd.provision.options import KeyAlgorithm

RELEASE: Final = "0.11.0"
"""The release of swtpm whose options these are."""
VERSION: Final = f"TPM emulator setup tool version {RELEASE}, of crbd\n"
WITH_VALUE: Final = (
    *("tpm-state", "tpmstate", "tpm", "swtpm_ioctl", "ek1keyalgo", "ek2keyalgo", "iakkeyalgo", "idevidkeyalgo"),
    *("ownerpass", "srkpass", "config", "vmid", "keyfile", "keyfile-fd", "pwdfile", "pwdfile-fd", "cipher"),
    *("runas", "logfile", "pcr-banks", "rsa-keysize", "write-ek-cert-files", "tcsd-system-ps-file"),
    *("profile", "profile-name", "profile-file", "profile-file-fd", "profile-remove-disabled"),
)
FLAGS: Final = (
    *("tpm2", "ecc", "createek", "create-spk", "take-ownership", "owner-well-known", "srk-well-known"),
    *("create-ek-cert", "create-platform-cert", "lock-nvram", "display", "overwrite", "not-overwrite"),
    *("allow-signing", "decryption", "version", "print-capabilities", "reconfigure", "print-profiles", "no-iak"),
    *("create-config-files", "help"),
)
NAMES: Final = {**dict.fromkeys(WITH_VALUE, True), **dict.fromkeys(FLAGS, False)}
"""Every option, and whether it takes a value; create-config-files may have one."""
ONLY_TPM_2: Final = ("ecc", "create-spk", "reconfigure", "allow-signing", "decryption")
PROFILE_SOURCES: Final = ("profile", "profile-name", "profile-file", "profile-file-fd")
CIPHERS: Final = ("aes-128-cbc", "aes-cbc", "aes-256-cbc")
KEY_ALGORITHMS: Final = {
    **{algorithm.value: algorithm for algorithm in KeyAlgorithm},
    **{algorithm.short: algorithm for algorithm in KeyAlgorithm},
}
_CONFIG_FILES: Final = "create-config-files"
HELP: Final = (
    VERSION
    + """
Usage: swtpm_setup [options]

Make a TPM 2.0 as a manufacturer would.

Where:
--tpm-state <place>      the state: a directory, dir://<directory> or file://<file>; needed
--tpmstate <place>       the same
--tpm '<program> socket' the TPM to use; default: crbd's own, in this process
--runas <user>           become this user
--config <file>          configuration; default: swtpm_setup.conf of the user, then of /etc
--logfile <file>         write messages there

What:
--tpm2                   a TPM 2; needed
--createek               make endorsement keys (EK): RSA 2048 and ECC P-384
--create-ek-cert         and certificates for them
--create-platform-cert   and a platform certificate
--create-spk             make a storage primary key: RSA 3072, with --ecc P-384
--ek1keyalgo <alg>       the first EK: rsa2048, rsa3072, rsa4096, secp256r1, secp384r1 or secp521r1
--ek2keyalgo <alg>       the second EK
--rsa-keysize <bits>     size of the first EK without --ek1keyalgo: 2048, 3072, 4096 or max
--iakkeyalgo <alg>       make an initial attestation key, with a certificate
--idevidkeyalgo <alg>    make an initial device identity key, with a certificate
--allow-signing          EKs that can sign; no standard EKs
--decryption             EKs that can decrypt; the default without --allow-signing
--lock-nvram             write-lock the NV indices
--vmid <name>            name of the virtual machine, for certificates
--write-ek-cert-files <directory>
                         write copies of the certificates there
--pcr-banks <banks>      PCR banks to activate, as sha256,sha384; - for all
--profile <json>, --profile-name <name>, --profile-file <file>, --profile-file-fd <fd>
                         the profile of the TPM; needs libtpms 0.10

Encrypted state:
--keyfile <file>         32 or 64 hexadecimal digits
--keyfile-fd <fd>        the same from a descriptor
--pwdfile <file>         a passphrase
--pwdfile-fd <fd>        the same from a descriptor
--cipher <cipher>        aes-128-cbc (default) or aes-256-cbc

A TPM that is there already:
--overwrite              make a new one in its place
--not-overwrite          leave it alone, and end well
--reconfigure            set its PCR banks and nothing else

Others:
--create-config-files [overwrite][,root][,skip-if-exist]
                         write configuration files for this user
--print-capabilities     print what this program can do, as JSON
--print-profiles         print the profiles that can be chosen, as JSON
--version
--help, -h
"""
)


@dataclass(slots=True)
class SetupOptions:
    """A command line's options: the last of each counts, but for PCR banks, which add up."""

    values: dict[str, str] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    config_files: list[str] | None = None
    """The words of create-config-files, if it was given."""

    def __getitem__(self, name: str) -> str:
        """The option's value, empty where it was not given."""
        return self.values.get(name, "")

    @property
    def state(self) -> str:
        """Where the state is, as swtpm's backend URI; empty where nothing was said."""
        place = self["tpmstate"]
        return place if not place or place.startswith(("dir://", "file://")) else f"dir://{place}"

    @property
    def certificates(self) -> bool:
        """Whether any certificate is wanted."""
        return bool(self.flags & {"create-ek-cert", "create-platform-cert"})

    @property
    def creates_ek(self) -> bool:
        """Whether endorsement keys are wanted; certificates need them."""
        return self.certificates or bool(self.flags & {"createek", "take-ownership"})


class HelpWantedError(UsageError):
    """The command line is wrong, and usage is to be shown."""


def parse(arguments: Sequence[str]) -> SetupOptions:
    """Raises UsageError; HelpWantedError where getopt finds fault with an option."""
    options = SetupOptions()
    found = Arguments(_without_optional_value(arguments), NAMES)
    for argument in found:
        match argument:
            case Complaint(text):
                raise HelpWantedError(f"swtpm_setup: {text}")
            case Operand():
                continue
        name, value = argument.name, argument.value
        if name == _CONFIG_FILES:
            following = found.peek()
            words = found.take() if following is not None and not following.startswith("-") else None
            options.config_files = (words or "").replace(",", " ").split()
        if name in (_CONFIG_FILES, "help", "version"):
            options.flags.add(name)
            return options
        _take(options, name, value)
    return options


def descriptor(options: SetupOptions, name: str) -> int:
    """The number of an open descriptor. Raises UsageError."""
    text = options[name]
    if not (text.isascii() and text.isdecimal()) or int(text) >= 0x7FFFFFFF:
        raise UsageError(f"Invalid file descriptor '{text}'")
    return int(text)


def check(options: SetupOptions) -> None:
    """See that the options go together, as far as the command line alone tells. Raises UsageError."""
    for name in ("keyfile-fd", "pwdfile-fd", "profile-file-fd"):
        if name in options.values:
            descriptor(options, name)
    if not options.state:
        raise UsageError("--tpm-state must be provided")
    if "take-ownership" in options.flags:
        raise UsageError("Taking ownership is not supported for TPM 2.")
    if "profile-remove-disabled" in options.values:
        raise UsageError("--profile-remove-disabled is not supported: libtpms decides what a profile may use.")
    sources = [name for name in PROFILE_SOURCES if name in options.values]
    if len(sources) > 1:
        names = "--profile, --profile-name, --profile-file, and --profile-file-fd"
        raise UsageError(f"Only one of {names} may be given.")
    if "cipher" in options.values and options["cipher"] not in CIPHERS:
        raise UsageError(f"Unsupported cipher {options['cipher']}.")
    if "reconfigure" in options.flags:
        if sources:
            raise UsageError("Reconfiguration does not accept a (new) profile.")
        if options.creates_ek:
            raise UsageError("Reconfiguration is not supported with creation of EK or certificates")


def key_algorithm(text: str) -> KeyAlgorithm:
    """A key algorithm by swtpm_setup's names for it, in any case. Raises UsageError."""
    found = KEY_ALGORITHMS.get(text.lower())
    if found is None:
        raise UsageError(f"Key algorithm {text} is not supported.")
    return found


def _take(options: SetupOptions, name: str, value: str) -> None:
    match name:
        case "tpm-state" | "tpmstate":
            options.values["tpmstate"] = value
        case "pcr-banks":
            before = options[name]
            options.values[name] = f"{before},{value.strip()}" if before else value.strip()
        case "swtpm_ioctl" | "tcsd-system-ps-file":
            print(f"Warning: --{name} is deprecated and has no effect.")
        case "profile-remove-disabled" if value not in ("check", "fips-host"):
            raise UsageError(f"Unsupported parameter for --profile-remove-disabled: {value}")
        case _ if NAMES[name]:
            options.values[name] = value
        case _:
            options.flags.add(name)


def _without_optional_value(arguments: Sequence[str]) -> list[str]:
    """The value of --create-config-files=VALUE as an argument of its own."""
    split: list[str] = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        split += [name, value] if equals and name == f"--{_CONFIG_FILES}" else [argument]
    return split
