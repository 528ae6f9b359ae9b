"""Provision a TPM in a store: all of it, or nothing.

Theory. Everything is done to a copy in memory (`StagedStore`), which one commit at the end makes the state. What ends a
run before, be it SIGKILL or a signer's refusal, leaves the store as it was: without a TPM, or with the one that was
there. So there is no half-made TPM, and nothing that a later run would have to recognise and clean up; the mark that a
run leaves in the directory (`RunMark`) is there for what is said alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from crbd.engine.port import Engine, StatePort
from crbd.errors import (
    EngineError,
    EngineFailedError,
    ProvisionError,
    StateAbsentError,
    StateError,
    StateWriteError,
    StoreError,
    UsageError,
)
from crbd.provision.banks import Banks, set_banks
from crbd.provision.keys import Work, write_copies
from crbd.provision.options import Existing, KeyAlgorithm, ProvisionOptions
from crbd.provision.report import Outcome, ProvisionReport
from crbd.provision.signing import (
    CertificateSigner,
    DevIdKind,
    DevIdRequest,
    DevIdSigner,
    EkRequest,
    TpmDescription,
)
from crbd.provision.staging import RunMark, StagedStore
from crbd.provision.templates import (
    PLATFORM_CERTIFICATE_INDEX,
    PersistentKey,
    attestation_key,
    device_identity_key,
    endorsement_key,
    storage_key,
)
from crbd.provision.tpm import PublicArea, Tpm
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.state.kinds import StateKind
from crbd.store.port import Store

MakeEngine = Callable[[StatePort], Engine]


def provision(
    store: Store,
    options: ProvisionOptions,
    signer: CertificateSigner | None,
    make_engine: MakeEngine,
    *,
    directory: Path | None = None,
) -> ProvisionReport:
    """Make the TPM in `store`, which is locked and stays the caller's to close, what `options` say.

    `signer` may be None where no certificate is asked for. `directory` is where the store's state lies: an interrupted
    run leaves a mark there, of which the next one tells. Raises OperatorError; the store is as before then.
    """
    _check(options, signer)
    with RunMark(directory) as mark:
        there = store.load(StateKind.PERMANENT) is not None
        notes: tuple[str, ...] = _interruption(there=there) if mark.was_interrupted else ()
        if there and options.existing is Existing.KEEP:
            return ProvisionReport(Outcome.KEPT, notes=notes)
        _check_existing(store, options, there=there)
        keeps = there and options.existing is not Existing.REPLACE
        if keeps and options.profile is not None:
            notes += ("the TPM that is there keeps its profile",)
        staged = StagedStore(store, keeps=keeps)
        with powered(staged, make_engine, profile=None if keeps else options.profile, new=not keeps) as instance:
            description = TpmDescription.parse(instance.info(TpmDescription.INFO_FLAGS))
            with Tpm.of_engine(instance.execute) as tpm:
                report = provision_tpm(tpm, options, signer, description)
        report = replace(
            report,
            outcome=_outcome(report, options, there=there),
            profile=staged.stamp.profile if staged.stamp is not None else "",
            notes=notes + report.notes,
        )
        if report.outcome is not Outcome.KEPT:
            staged.publish(_ek_fingerprint(report, keeps=keeps))
        return report


def _ek_fingerprint(report: ProvisionReport, *, keeps: bool) -> bytes | None:
    """The first endorsement key's, as an identity has it; None where none was made and the TPM is an old one."""
    for key in report.keys:
        if key.role == "EK":
            return bytes.fromhex(key.fingerprint)
    return None if keeps else b""


def provision_tpm(
    tpm: Tpm, options: ProvisionOptions, signer: CertificateSigner | None, description: TpmDescription
) -> ProvisionReport:
    """The same to a TPM that runs, wherever it does; at the end it is shut down (TPM2_Shutdown).

    Nothing is taken back where this raises: that is the caller's to do. Raises OperatorError.
    """
    work = Work(tpm, options.lock_nvram)
    if options.existing is not Existing.RECONFIGURE:
        _Provisioning(work, options, signer, description).run()
    banks = set_banks(tpm, options.pcr_banks)
    files: tuple[Path, ...] = ()
    if options.certificate_directory is not None:
        files = write_copies(options.certificate_directory, work.certificates)
    tpm.shutdown()
    return ProvisionReport(
        Outcome.COMPLETED if work.changed or banks.changed else Outcome.KEPT,
        tuple(work.keys),
        tuple(work.indices),
        banks.active,
        banks.available,
        files=files,
        notes=_bank_notes(banks),
    )


@contextmanager
def powered(staged: StagedStore, make_engine: MakeEngine, *, profile: str | None, new: bool) -> Iterator[Instance]:
    """The TPM of a staged store, started with TPM2_Startup(CLEAR). Raises OperatorError."""

    def make(port: StatePort) -> Engine:
        engine = make_engine(port)
        if profile is not None:
            try:
                engine.set_profile(profile)
            except EngineError as error:
                version = engine.version
                engine.close()
                raise ProvisionError(
                    f"libtpms {version} does not take the profile {profile}: {error}",
                    "profiles need libtpms 0.10; choose one that it has, or none",
                ) from error
        return engine

    behaviour = InstanceOptions(startup=Startup.CLEAR, may_manufacture=new, auto_shutdown=False)
    instance = Instance(make, staged, behaviour)
    try:
        instance.check()
        try:
            instance.begin()
        except StoreError as error:
            raise StateWriteError.of(error) from error
        except EngineError as error:
            raise EngineFailedError(str(error), "the state was not changed") from error
        yield instance
    finally:
        instance.close()


@dataclass(frozen=True, slots=True)
class _Provisioning:
    """The keys and certificates, in swtpm_setup's order: SRK, EKs, platform certificate, IAK, IDevID."""

    work: Work
    options: ProvisionOptions
    signer: CertificateSigner | None
    description: TpmDescription

    def run(self) -> None:
        options = self.options
        if options.storage_key is not None:
            self.work.key(storage_key(options.storage_key))
        ek_certificate = b""
        for number, algorithm in enumerate(dict.fromkeys(options.endorsement_keys)):
            certificate = self._endorsement_key(algorithm, with_platform=number == 0 and options.platform_certificate)
            ek_certificate = ek_certificate or certificate
        if options.attestation_key is not None:
            self._device_key(DevIdKind.IAK, attestation_key(options.attestation_key), ek_certificate)
        if options.device_identity_key is not None:
            self._device_key(DevIdKind.IDEVID, device_identity_key(options.device_identity_key), ek_certificate)

    def _endorsement_key(self, algorithm: KeyAlgorithm, *, with_platform: bool) -> bytes:
        """Make it; returns its certificate in DER, empty where none is asked for."""
        options, signer = self.options, self.signer
        key = endorsement_key(
            algorithm,
            high_range=options.high_range,
            allow_signing=options.allow_signing,
            decryption=options.decryption,
        )
        public = self.work.key(key)
        if options.allow_signing:
            self.work.template(key)
        certificate = b""
        if options.ek_certificates and signer is not None:
            assert key.certificate_index is not None
            request = self._request(public)
            certificate = self.work.certificate(
                key.certificate_index, "EK", public, lambda: signer.ek_certificate(request)
            )
            self.work.certificates[f"ek-{algorithm.short}.crt"] = certificate
        if with_platform and signer is not None:
            request = self._request(public)
            self.work.platform_certificate(PLATFORM_CERTIFICATE_INDEX, lambda: signer.platform_certificate(request))
        return certificate

    def _device_key(self, kind: DevIdKind, key: PersistentKey, ek_certificate: bytes) -> None:
        public = self.work.key(key)
        signer, options = _devid_signer(self.signer), self.options
        if not options.ek_certificates or signer is None:
            return
        assert key.certificate_index is not None
        request = DevIdRequest(
            kind,
            public.key,
            options.subject,
            self.description.specification,
            self.description.attributes,
            options.platform,
            ek_certificate,
        )
        certificate = self.work.certificate(
            key.certificate_index, key.role, public, lambda: signer.devid_certificate(request)
        )
        self.work.certificates[f"{kind.value}-{key.template.algorithm.short}.crt"] = certificate

    def _request(self, public: PublicArea) -> EkRequest:
        options = self.options
        return EkRequest(
            public.key,
            options.subject,
            self.description.specification,
            self.description.attributes,
            options.platform,
            allow_signing=options.allow_signing,
            decryption=options.decryption or not options.allow_signing,
        )


def _check(options: ProvisionOptions, signer: CertificateSigner | None) -> None:
    """Raises UsageError for options that contradict each other."""
    if options.existing is Existing.RECONFIGURE:
        return
    certificates = options.ek_certificates or options.platform_certificate
    if certificates and not options.endorsement_keys:
        raise UsageError("certificates are asked for, and no endorsement key", "ask for an endorsement key too")
    if certificates and signer is None:
        raise UsageError("certificates are asked for, and there is nobody to sign them", "name a signer")
    wants_device_keys = options.attestation_key is not None or options.device_identity_key is not None
    if wants_device_keys and options.ek_certificates and _devid_signer(signer) is None:
        raise UsageError("this signer does not certify device identity keys", "leave out the IAK and the IDevID key")


def _devid_signer(signer: object) -> DevIdSigner | None:
    return signer if isinstance(signer, DevIdSigner) else None


def _check_existing(store: Store, options: ProvisionOptions, *, there: bool) -> None:
    """Raises StateError where what is there, or is not, forbids what is wanted."""
    existing = options.existing
    if not there:
        if existing is Existing.RECONFIGURE:
            raise StateAbsentError(f"there is no TPM state in {store.name}", "provision a new TPM first")
        return
    if existing is Existing.REFUSE:
        raise StateError(f"there is a TPM in {store.name} already", "complete it or replace it, or name another place")
    if existing is not Existing.REPLACE and store.load(StateKind.VOLATILE) is not None:
        raise StateError(
            f"the TPM in {store.name} is suspended: its volatile state is stored", "let its machine go on and shut down"
        )


def _outcome(report: ProvisionReport, options: ProvisionOptions, *, there: bool) -> Outcome:
    if not there:
        return Outcome.MADE
    if options.existing is Existing.REPLACE:
        return Outcome.REPLACED
    if report.outcome is Outcome.KEPT:
        return Outcome.KEPT
    return Outcome.RECONFIGURED if options.existing is Existing.RECONFIGURE else Outcome.COMPLETED


def _interruption(*, there: bool) -> tuple[str, ...]:
    if there:
        return ("an earlier run was interrupted; it left a whole TPM, either as it was before or as it was to be",)
    return ("an earlier run was interrupted before it had stored anything; it was started over",)


def _bank_notes(banks: Banks) -> tuple[str, ...]:
    return tuple(f"this TPM has no PCR bank {name}; it was left out" for name in banks.missing)
