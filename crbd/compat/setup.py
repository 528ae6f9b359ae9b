"""`swtpm_setup`: make a TPM as a manufacturer would: keys, certificates, PCR banks.

Options, configuration files, the JSON of --print-capabilities and exit status are those of swtpm 0.11, without TPM 1.2.
The TPM is crbd's own, in this process and committed as a whole (crbd.provision), unless --tpm names another program.
"""

from __future__ import annotations

import gc
import grp
import json
import os
import pwd
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from crbd.compat import setup_options
from crbd.compat.localca_configuration import (
    SETUP_FILE,
    Configuration,
    default_file,
    read_configuration,
    user_name,
)
from crbd.compat.setup_config_files import create_config_files
from crbd.compat.setup_log import Log
from crbd.compat.setup_options import HELP, RELEASE, VERSION, HelpWantedError, SetupOptions
from crbd.compat.setup_profiles import all_profiles
from crbd.compat.setup_tpm import Place, TpmAbilities, TpmProgram, chosen_program, own_abilities
from crbd.errors import OperatorError, UsageError
from crbd.provision.options import Existing
from crbd.provision.report import ProvisionReport

FEATURES: Final = (
    *("cmdarg-keyfile-fd", "cmdarg-pwdfile-fd", "cmdarg-write-ek-cert-files", "cmdarg-create-config-files"),
    "cmdarg-reconfigure-pcr-banks",
)
KEY_FEATURES: Final = ("cmdarg-ek1keyalgo", "cmdarg-ek2keyalgo", "cmdarg-iakkeyalgo", "cmdarg-idevidkeyalgo")
_MAX_UID: Final = 0xFFFFFFFE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 1 with the reason in the log or on stderr."""
    log = Log()
    try:
        options = setup_options.parse(sys.argv[1:] if argv is None else argv)
        if _told(options):
            return 0
        log = Log.open(options["logfile"])
        _run(options, log)
    except HelpWantedError as error:
        print(error, file=sys.stderr)
        sys.stdout.write(HELP)
        return 1
    except OperatorError as error:
        log.complain(str(error))
        return 1
    return 0


def _told(options: SetupOptions) -> bool:
    """Whether the command line asks for something that has nothing to do with a TPM, which is done."""
    if "help" in options.flags:
        sys.stdout.write(HELP)
    elif "version" in options.flags:
        sys.stdout.write(VERSION)
    elif options.config_files is not None:
        create_config_files(options.config_files, _localca())
    else:
        return False
    return True


def _run(options: SetupOptions, log: Log) -> None:
    program = chosen_program(options["tpm"]) if "tpm" in options.values else None
    if "print-capabilities" in options.flags:
        print(_capabilities(_abilities(program)))
        return
    if "tpm2" not in options.flags:
        for name in setup_options.ONLY_TPM_2:
            if name in options.flags:
                raise UsageError(f"--{name} requires --tpm2.")
        raise UsageError("crbd does not support TPM 1.2: use --tpm2")
    if "runas" in options.values:
        _become(options["runas"])
    if "print-profiles" in options.flags:
        print(json.dumps(all_profiles(_configuration(options), _abilities(program).profiles)))
        return
    setup_options.check(options)
    place = Place(options.state)
    place.check_access()
    if "write-ek-cert-files" in options.values:
        _check_writable(Path(options["write-ek-cert-files"]))
    existing = _existing(options, place)
    if existing is Existing.KEEP:
        log.say("Not overwriting existing state file.")
        return
    _provision(options, program, place, existing, log)


def _provision(options: SetupOptions, program: TpmProgram | None, place: Place, existing: Existing, log: Log) -> None:
    work = _prepare_work()(options, _configuration(options), place, existing, program, log=log)
    reconfigure = existing is Existing.RECONFIGURE
    log.say(f"Starting vTPM {'reconfiguration' if reconfigure else 'manufacturing'} as {_who()} @ {_now()}")
    try:
        report = work()
    except OperatorError as error:
        log.complain(str(error))
        raise UsageError("An error occurred. Authoring the TPM state failed.") from error
    _tell(report, log)
    log.say("Successfully authored TPM state.")
    log.say(f"Ending vTPM manufacturing @ {_now()}")


def _prepare_work() -> Callable[..., Callable[[], ProvisionReport]]:
    """setup_work's `provision_place`.

    tpm2-pytss and cryptography take 0.2 s to import: what needs no keys made does not wait for them. Nothing of that is
    garbage: looking for some would take a sixth of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        prepare: Callable[..., Callable[[], ProvisionReport]] = import_module("crbd.compat.setup_work").provision_place
    finally:
        if collecting:
            gc.enable()
    return prepare


def _existing(options: SetupOptions, place: Place) -> Existing:
    """What to do about a TPM that may be there. Raises UsageError where there is one and nothing was said about it."""
    if "reconfigure" in options.flags:
        return Existing.RECONFIGURE
    if not place.holds_state():
        return Existing.REFUSE
    if "not-overwrite" in options.flags:
        return Existing.KEEP
    if "overwrite" in options.flags:
        return Existing.REPLACE
    raise UsageError(f"Found existing TPM state '{place.found}'.")


def _abilities(program: TpmProgram | None) -> TpmAbilities:
    return own_abilities() if program is None else program.abilities()


def _capabilities(abilities: TpmAbilities) -> str:
    sizes = [f"tpm2-rsa-keysize-{bits}" for bits in abilities.rsa_sizes if bits >= 2048]
    profiles = ["cmdarg-profile"] if abilities.profiles else []
    told: Mapping[str, object] = {
        "type": "swtpm_setup",
        "features": ["tpm-2.0", *FEATURES, *sizes, *profiles, *KEY_FEATURES],
        "profiles": list(abilities.profiles),
        "version": RELEASE,
    }
    return json.dumps(told)


def _configuration(options: SetupOptions) -> Configuration:
    """The configuration file; without one that was named or is in a usual place, an empty one. Raises UsageError."""
    named = options["config"]
    path = Path(named) if named else default_file(SETUP_FILE)
    if not named and not os.path.exists(path):
        return Configuration("")
    return read_configuration(path, "config file")


def _become(user: str) -> None:
    """Change to another user. Raises UsageError."""
    try:
        if user.isdecimal():
            uid = gid = int(user)
            if uid > _MAX_UID:
                raise UsageError(f"Error: uid {user} outside valid range.")
        else:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
            os.initgroups(user, gid)
        os.setgid(gid)
        os.setuid(uid)
    except KeyError as error:
        raise UsageError(f"Error: User '{user}' does not exist.") from error
    except OSError as error:
        raise UsageError(f"Error: changing to user {user} failed: {error.strerror}") from error


def _check_writable(directory: Path) -> None:
    if not os.path.isdir(directory):
        raise UsageError(
            f"User {user_name()} cannot access directory {directory}. Make sure it exists and is a directory."
        )
    if not os.access(directory, os.W_OK):
        raise UsageError(f"Need write rights on directory {directory} for user {user_name()}.")


def _tell(report: ProvisionReport, log: Log) -> None:
    for key in report.keys:
        kind = f"RSA {key.algorithm.removeprefix('rsa')}" if key.algorithm.startswith("rsa") else "ECC"
        if key.new:
            log.say(f"Successfully created {kind} {key.role} with handle 0x{key.handle:x}.")
    for index in report.indices:
        if index.new:
            log.say(f"Successfully created NVRAM area 0x{index.index:x} for {index.what}.")
    for note in report.notes:
        log.say(f"Note: {note}.")
    if report.active_banks:
        active, available = ",".join(report.active_banks), ",".join(report.available_banks)
        log.say(f"Successfully activated PCR banks {active} among {available}.")


def _localca() -> str:
    """The swtpm_localca beside this command, else that of the PATH; its name alone where there is none."""
    beside = Path(sys.argv[0]).absolute().parent / "swtpm_localca"
    return str(beside) if os.access(beside, os.X_OK) else shutil.which("swtpm_localca") or "swtpm_localca"


def _who() -> str:
    try:
        group = grp.getgrgid(os.getgid()).gr_name
    except KeyError:
        group = "<unknown>"
    return f"{user_name()}:{group}"


def _now() -> str:
    return time.strftime("%a %d %b %Y %I:%M:%S %p %Z")
