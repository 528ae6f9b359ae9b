"""swtpm_setup's provisioning itself: of crbd's own TPM in a store, or of a program's over its sockets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Final

from crbd.cli.swtpm_key import read_swtpm_key
from crbd.compat.localca_configuration import Configuration
from crbd.compat.setup_log import Log
from crbd.compat.setup_options import SetupOptions
from crbd.compat.setup_plan import key_specification, provision_options, signer
from crbd.compat.setup_tpm import Place, TpmProgram, own_abilities
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.provision.options import Existing, ProvisionOptions
from crbd.provision.provisioning import provision
from crbd.provision.report import ProvisionReport
from crbd.provision.signing import CertificateSigner
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.side import SideState
from crbd.store.layout import open_backend
from crbd.store.memory import MemoryStore
from crbd.store.options import FileOptions
from crbd.store.port import Store

FILES: Final = FileOptions(mode=0o640, lock_mode=0o640)
"""The modes of swtpm's files, under the umask: libvirt's group may read them."""


def provision_place(
    options: SetupOptions,
    configuration: Configuration,
    place: Place,
    existing: Existing,
    program: TpmProgram | None,
    *,
    log: Log,
) -> Callable[[], ProvisionReport]:
    """Check what is wanted, and return what does it when it is called. Both raise OperatorError."""
    wanted = provision_options(
        options, configuration, own_abilities() if program is None else program.abilities(), existing
    )
    key = key_specification(options, log)

    def work() -> ProvisionReport:
        signs = signer(options, configuration, log)
        if program is None:
            return _provision_own(place, wanted, signs, key)
        # Its control channel's messages are not needed otherwise.
        drive: Callable[..., ProvisionReport] = import_module("crbd.compat.setup_program").provision_other
        return drive(program, place.uri, wanted, signs, key, log=log)

    return work


def _provision_own(
    place: Place, options: ProvisionOptions, signer: CertificateSigner | None, key: str
) -> ProvisionReport:
    """libtpms in this process, committed to its state as a whole or not at all. `key`: swtpm's --key, or empty."""
    swtpm_key = read_swtpm_key(key, "the key") if key else None
    create = options.existing is not Existing.RECONFIGURE
    store: Store = open_backend(place.uri, create=create, swtpm_key=swtpm_key, options=FILES)
    try:
        if options.existing is Existing.REPLACE:
            store = _Overwritten(store)
        return provision(store, options, signer, _engine, directory=place.directory)
    finally:
        store.close()


class _Overwritten(MemoryStore):
    """A store whose TPM is given up: nothing is read from it, be it damaged or of another key. What is written to this
    one is written to it too."""

    def __init__(self, behind: Store) -> None:
        super().__init__()
        self._behind = behind

    @property
    def name(self) -> str:
        return self._behind.name

    def use_engine(self, stamp: EngineStamp) -> None:
        self._behind.use_engine(stamp)

    def commit(self, changes: Mapping[StateKind, bytes | None], side: SideState | None = None) -> None:
        # The old TPM's volatile state goes with it, in one commit: neither meets the other's, not even in a power cut.
        nothing: dict[StateKind, bytes | None] = dict.fromkeys(StateKind)
        wanted = {kind: self.load(kind) for kind in StateKind} | dict(changes)
        self._behind.commit(nothing | wanted, side)
        super().commit(changes, side)

    def close(self) -> None:
        self._behind.close()


def _engine(port: StatePort) -> Engine:
    return LibtpmsEngine(port)
