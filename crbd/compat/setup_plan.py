"""What swtpm_setup's options and configuration ask of provisioning, and who signs the certificates."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from crbd.compat.localca_configuration import Configuration
from crbd.compat.localca_signer import open_localca
from crbd.compat.setup_config_files import DEFAULT_BANKS
from crbd.compat.setup_log import Log
from crbd.compat.setup_options import SetupOptions, descriptor, key_algorithm
from crbd.compat.setup_profiles import chosen_profile
from crbd.compat.setup_tpm import TpmAbilities, beginning_of, is_launcher
from crbd.errors import UsageError
from crbd.provision.options import Existing, KeyAlgorithm, ProvisionOptions
from crbd.provision.signers import CertsTool, ToolSigner
from crbd.provision.signing import CertificateSigner

LOCALCA_NAMES: Final = ("swtpm_localca", "swtpm-localca")
_ELF: Final = b"\x7fELF"
_WRAPPERS: Final = Path("/usr/share/swtpm")
"""Where distributions have a script swtpm-localca that runs swtpm_localca."""


def provision_options(
    options: SetupOptions, configuration: Configuration, abilities: TpmAbilities, existing: Existing
) -> ProvisionOptions:
    """Raises UsageError."""
    reconfigure = existing is Existing.RECONFIGURE
    attestation = _configured_algorithm("iakkeyalgo", options, configuration, abilities)
    identity = _configured_algorithm("idevidkeyalgo", options, configuration, abilities)
    if (attestation or identity) and "create-ek-cert" not in options.flags and not reconfigure:
        if "iakkeyalgo" in options.values or "idevidkeyalgo" in options.values:
            raise UsageError("When creating IAK and/or IDevID keys, then an EK certificate must be created as well.")
        attestation = identity = None
    storage = KeyAlgorithm.ECC_P384 if "ecc" in options.flags else KeyAlgorithm.RSA_3072
    certificates = options["write-ek-cert-files"]
    signs = "allow-signing" in options.flags
    return ProvisionOptions(
        endorsement_keys=_endorsement_keys(options, configuration, abilities) if options.creates_ek else (),
        allow_signing=signs,
        decryption="decryption" in options.flags or not signs,
        storage_key=storage if "create-spk" in options.flags else None,
        attestation_key=attestation,
        device_identity_key=identity,
        ek_certificates="create-ek-cert" in options.flags,
        platform_certificate="create-platform-cert" in options.flags,
        lock_nvram="lock-nvram" in options.flags,
        pcr_banks=_pcr_banks(options, configuration),
        profile=None if reconfigure else chosen_profile(options, configuration, abilities.profiles),
        subject=options["vmid"],
        existing=existing,
        certificate_directory=Path(certificates) if certificates else None,
    )


def signer(options: SetupOptions, configuration: Configuration, log: Log) -> CertificateSigner | None:
    """Who signs the certificates, if any are wanted. Raises OperatorError.

    swtpm_localca, which configurations name mostly, is not run: what it does is done here, with its files.
    """
    if not options.certificates:
        return None
    tool = configuration["create_certs_tool"]
    settings, words = configuration["create_certs_tool_config"], configuration["create_certs_tool_options"]
    if not tool or _is_localca(tool):
        return open_localca(settings, words, log)
    program = shutil.which(tool)
    if program is None:
        raise UsageError(f"Could not find {tool} in PATH.")
    return ToolSigner(CertsTool(program, settings, words, log.path), log.say)


def key_specification(options: SetupOptions, log: Log) -> str:
    """The state's key as swtpm's --key takes it; empty where none was given. Raises UsageError."""
    mode = f"mode={options['cipher'] or 'aes-128-cbc'}"
    for name, source in (("keyfile", "file"), ("pwdfile", "pwdfile")):
        if name in options.values:
            path = options[name]
            if not os.access(path, os.R_OK):
                raise UsageError(f"The {name} {path} cannot be read.")
            log.say(f"  The TPM's state will be encrypted with the key of {name} {path}.")
            return f"{source}={path},{mode}"
    for name, source in (("keyfile-fd", "fd"), ("pwdfile-fd", "pwdfd")):
        if name in options.values:
            log.say(f"  The TPM's state will be encrypted with the key of {name}.")
            return f"{source}={descriptor(options, name)},{mode}"
    return ""


def _is_localca(tool: str) -> bool:
    if Path(tool).name not in LOCALCA_NAMES:
        return False
    found = shutil.which(tool)
    if found is None or _WRAPPERS in Path(found).parents:
        return True
    return beginning_of(found).startswith(_ELF) or is_launcher(found)


def _endorsement_keys(
    options: SetupOptions, configuration: Configuration, abilities: TpmAbilities
) -> tuple[KeyAlgorithm, ...]:
    first = _configured_algorithm("ek1keyalgo", options, configuration, abilities)
    if first is None:
        first = _rsa_algorithm(options["rsa-keysize"] or configuration["rsa_keysize"] or "2048", abilities)
    second = _configured_algorithm("ek2keyalgo", options, configuration, abilities) or KeyAlgorithm.ECC_P384
    return tuple(dict.fromkeys((first, second)))


def _configured_algorithm(
    name: str, options: SetupOptions, configuration: Configuration, abilities: TpmAbilities
) -> KeyAlgorithm | None:
    text = options[name] or configuration[name]
    if not text:
        return None
    algorithm = key_algorithm(text)
    if algorithm.is_rsa:
        _rsa_algorithm(algorithm.value.removeprefix("rsa"), abilities)
    return algorithm


def _rsa_algorithm(size: str, abilities: TpmAbilities) -> KeyAlgorithm:
    if size == "max":
        size = str(max((2048, *(bits for bits in abilities.rsa_sizes if bits <= 4096))))
    if size not in ("2048", "3072", "4096"):
        raise UsageError(f"Unsupported RSA key size {size}.")
    if size != "2048" and int(size) not in abilities.rsa_sizes:
        raise UsageError(f"{size} bit RSA keys are not supported by libtpms.")
    return KeyAlgorithm(f"rsa{size}")


def _pcr_banks(options: SetupOptions, configuration: Configuration) -> tuple[str, ...] | None:
    for text in (options["pcr-banks"], configuration["active_pcr_banks"], DEFAULT_BANKS):
        banks = tuple(bank for part in text.split(",") if (bank := part.strip()))
        if banks == ("-",):
            return None
        if banks:
            return banks
    return None
