"""The TPM that swtpm_setup provisions, crbd's own or another program's; and the place where its state is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Final

from crbd.compat.localca_configuration import user_name
from crbd.compat.setup_log import Log
from crbd.compat.setup_plan import TpmAbilities
from crbd.compat.setup_program import TpmProgram
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import EngineError, StateAbsentError, StateError, UsageError
from crbd.provision.options import ProvisionOptions
from crbd.provision.report import ProvisionReport
from crbd.provision.signing import CertificateSigner
from crbd.service.durable import DurableState
from crbd.state.kinds import StateKind
from crbd.store.layout import open_backend
from crbd.store.memory import MemoryStore

PERMANENT_FILE: Final = "tpm2-00.permall"
_CRBD_FILE: Final = "tpm.crbd"
_INFO_FEATURES: Final = 4
"""TPMLIB_INFO_TPMFEATURES."""
_INFO_PROFILES: Final = 64
"""TPMLIB_INFO_AVAILABLE_PROFILES."""
_RSA_FEATURE: Final = "rsa-keysize-"
_WORK: Final = "crbd.compat.setup_work"
"""Imported only when there is something to do: what needs no keys made should not wait for tpm2-pytss (0.1 s)."""


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
        try:
            store = open_backend(self.uri, create=False, lock=False)
        except StateAbsentError:
            return False
        except StateError:
            return True
        try:
            return store.load(StateKind.PERMANENT) is not None
        except StateError:
            return True
        finally:
            store.close()


class OwnTpm:
    """crbd's own TPM: libtpms in this process, committed to its state as a whole or not at all."""

    def __init__(self) -> None:
        self._abilities: TpmAbilities | None = None

    def abilities(self) -> TpmAbilities:
        """What libtpms says of itself. Raises OperatorError."""
        if self._abilities is None:
            engine = LibtpmsEngine(DurableState(MemoryStore()))
            try:
                sizes = json.loads(engine.info(_INFO_FEATURES))["TPMFeatures"].get("RSAKeySizes", [])
                profiles = []
                if engine.supports_profiles:
                    profiles = json.loads(engine.info(_INFO_PROFILES)).get("AvailableProfiles", [])
            except (EngineError, ValueError, KeyError) as error:
                raise UsageError(f"libtpms {engine.version} does not describe its TPM: {error}") from error
            finally:
                engine.close()
            names = tuple(str(profile["Name"]) for profile in profiles)
            self._abilities = TpmAbilities(tuple(sorted(int(bits) for bits in sizes)), names)
        return self._abilities

    def provision(
        self, place: Place, options: ProvisionOptions, signer: CertificateSigner | None, key: str, log: Log
    ) -> ProvisionReport:
        """Raises OperatorError; the state is as before then."""
        work: Callable[..., ProvisionReport] = import_module(_WORK).provision_own
        return work(place.uri, place.directory, options, signer, key)


class OtherTpm:
    """Another program's TPM."""

    def __init__(self, program: TpmProgram) -> None:
        self._program = program

    def abilities(self) -> TpmAbilities:
        """What the program's --print-capabilities says. Raises OperatorError."""
        features = self._program.capabilities()
        if "tpm-2.0" not in features and any(feature.startswith("tpm-") for feature in features):
            raise UsageError(f"swtpm at {self._program.command[0]} does not support TPM 2")
        sizes = [feature.removeprefix(_RSA_FEATURE) for feature in features if feature.startswith(_RSA_FEATURE)]
        return TpmAbilities(
            tuple(sorted(int(bits) for bits in sizes if bits.isdecimal())), tuple(self._program.profiles())
        )

    def provision(
        self, place: Place, options: ProvisionOptions, signer: CertificateSigner | None, key: str, log: Log
    ) -> ProvisionReport:
        """Raises OperatorError; there is no state then, or, when reconfiguring, what the program made of it."""
        work: Callable[..., ProvisionReport] = import_module(_WORK).provision_other
        return work(self._program, place.uri, options, signer, key, log=log)
