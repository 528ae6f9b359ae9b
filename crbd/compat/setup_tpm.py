"""Which TPM swtpm_setup provisions, crbd's own or another program's, and where its state is.

What is imported here is as little as questions about them need: --print-capabilities and --not-overwrite end soon.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from crbd.compat.localca_configuration import user_name
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import DaemonError, EngineError, UsageError
from crbd.state.kinds import StateKind

PERMANENT_FILE: Final = "tpm2-00.permall"
PROGRAM_PATIENCE: Final = 30.0
"""Seconds for a program to say what it can do."""
LAUNCHER_MARK: Final = b"crbd-compat"
"""What stands in the launchers of crbd's own swtpm commands."""
_CRBD_FILE: Final = "tpm.crbd"
_INFO_FEATURES: Final = 4
"""TPMLIB_INFO_TPMFEATURES."""
_INFO_PROFILES: Final = 64
"""TPMLIB_INFO_AVAILABLE_PROFILES."""
_RSA_FEATURE: Final = "rsa-keysize-"


@dataclass(frozen=True, slots=True)
class TpmAbilities:
    """What the TPM that is to be provisioned can do."""

    rsa_sizes: tuple[int, ...]
    """Bits of its RSA keys, smallest first."""
    profiles: tuple[str, ...]
    """Names of its profiles; none where it knows no profiles."""


@dataclass(frozen=True, slots=True)
class TpmProgram:
    """The program and the arguments it is always given, as `swtpm socket`."""

    command: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> TpmProgram:
        """Of --tpm's value. Raises UsageError where it is not executable."""
        try:
            words = shlex.split(text)
        except ValueError as error:
            raise UsageError(f"--tpm {text}: {error}") from error
        if not words or shutil.which(words[0]) is None:
            raise UsageError(f"swtpm at {words[0] if words else text} is not an executable.")
        return cls(tuple(words))

    def capabilities(self) -> list[str]:
        """What it says it can do. Raises DaemonError."""
        found = self._printed("--print-capabilities", "--tpm2")
        features = found.get("features")
        return [str(feature) for feature in features] if isinstance(features, list) else []

    def profiles(self) -> list[str]:
        """The names of its profiles. Raises DaemonError."""
        found = self._printed("--print-capabilities", "--tpm2").get("profiles")
        names = found.get("names") if isinstance(found, dict) else None
        return [str(name) for name in names] if isinstance(names, list) else []

    def abilities(self) -> TpmAbilities:
        """What it can do, of what provisioning asks. Raises DaemonError; UsageError where it has no TPM 2."""
        features = self.capabilities()
        if "tpm-2.0" not in features and any(feature.startswith("tpm-") for feature in features):
            raise UsageError(f"swtpm at {self.command[0]} does not support TPM 2")
        sizes = [feature.removeprefix(_RSA_FEATURE) for feature in features if feature.startswith(_RSA_FEATURE)]
        return TpmAbilities(tuple(sorted(int(bits) for bits in sizes if bits.isdecimal())), tuple(self.profiles()))

    def _printed(self, *arguments: str) -> dict[str, object]:
        try:
            done = subprocess.run(
                [*self.command, *arguments], check=False, capture_output=True, timeout=PROGRAM_PATIENCE
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DaemonError(f"Could not start swtpm '{self.command[0]}': {error}") from error
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip()
            raise DaemonError(f"Failed to run swtpm '{self.command[0]}': {said}")
        try:
            found = json.loads(done.stdout)
        except ValueError as error:
            raise DaemonError(f"What '{self.command[0]}' prints of its capabilities is no JSON.") from error
        return found if isinstance(found, dict) else {}


@dataclass(slots=True)
class Place:
    """Where the state is: swtpm's backend URI, dir://PATH or file://PATH."""

    uri: str
    found: str = ""
    """What `holds_state` found."""

    @property
    def path(self) -> Path:
        return Path(self.uri.partition("://")[2])

    @property
    def directory(self) -> Path | None:
        """The state directory; None where the state is one file."""
        return self.path if self.uri.startswith("dir://") else None

    def check_access(self) -> None:
        """Raises UsageError where this user may not use the place."""
        user = user_name()
        if self.directory is None:
            if os.path.exists(self.path) and not os.access(self.path, os.R_OK | os.W_OK):
                raise UsageError(f"Need read/write rights on {self.path} for user {user}.")
            return
        lock = self.path / ".lock"
        if os.path.exists(lock) and not os.access(lock, os.R_OK | os.W_OK):
            raise UsageError(f"User {user} cannot read/write lockfile {lock}.")
        if not os.path.isdir(self.path):
            raise UsageError(
                f"User {user} cannot access directory {self.path}. Make sure it exists and is a directory."
            )
        for right, name in ((os.R_OK, "read"), (os.W_OK, "write")):
            if not os.access(self.path, right):
                raise UsageError(f"Need {name} rights on directory {self.path} for user {user}.")

    def holds_state(self) -> bool:
        """Whether there is a TPM, readable or not."""
        if self.directory is not None:
            names = [name for name in (PERMANENT_FILE, _CRBD_FILE) if os.path.lexists(self.path / name)]
            self.found = names[0] if names else ""
            return bool(names)
        self.found = str(self.path)
        look: Callable[[str], bool] = import_module("crbd.compat.setup_linear").linear_holds_state
        return look(self.uri)


def own_abilities() -> TpmAbilities:
    """What libtpms says of the TPM that it makes. Raises OperatorError."""
    engine = LibtpmsEngine(_NoState())
    try:
        sizes = json.loads(engine.info(_INFO_FEATURES))["TPMFeatures"].get("RSAKeySizes", [])
        profiles = []
        if engine.supports_profiles:
            profiles = json.loads(engine.info(_INFO_PROFILES)).get("AvailableProfiles", [])
        names = tuple(str(profile["Name"]) for profile in profiles)
        return TpmAbilities(tuple(sorted(int(bits) for bits in sizes)), names)
    except (EngineError, ValueError, KeyError) as error:
        raise UsageError(f"libtpms {engine.version} does not describe its TPM: {error}") from error
    finally:
        engine.close()


def chosen_program(text: str) -> TpmProgram | None:
    """The program that --tpm's value names; None where it is crbd's own swtpm. Raises UsageError."""
    program = TpmProgram.parse(text)
    found = shutil.which(program.command[0]) or ""
    return None if is_launcher(found) and program.command[1:] == ("socket",) else program


def is_launcher(program: str) -> bool:
    """Whether a file is one of crbd's own swtpm commands."""
    return LAUNCHER_MARK in beginning_of(program)


def beginning_of(program: str) -> bytes:
    """The first bytes of a file, none where it cannot be read."""
    try:
        with open(program, "rb") as file:
            return file.read(4096)
    except OSError:
        return b""


class _NoState:
    """The state port of a TPM that is never started."""

    def load(self, kind: StateKind) -> bytes | None:
        return None

    def store(self, kind: StateKind, data: bytes) -> None:
        raise AssertionError(kind)

    def delete(self, kind: StateKind) -> None:
        raise AssertionError(kind)
