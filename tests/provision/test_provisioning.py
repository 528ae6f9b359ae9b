"""provision(): what a new TPM gets, and what becomes of one that is there."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from cryptography import x509

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import EngineFailedError, ProvisionError, StateAbsentError, StateError, UsageError
from crbd.provision import templates
from crbd.provision.options import Existing, KeyAlgorithm, ProvisionOptions
from crbd.provision.provisioning import powered, provision
from crbd.provision.report import Outcome
from crbd.provision.signing import DevIdKind, DevIdRequest, EkRequest, Specification, TpmAttributes
from crbd.provision.staging import StagedStore
from crbd.provision.tpm import marshalled
from crbd.state.kinds import StateKind
from crbd.store.memory import MemoryStore
from tests.engine import commands as c

from .tpms import CERTIFIED, P256, DeviceSigner, Signer, certificate, looked_at, make, plain_tpm, running

EK, CERTIFICATE, TEMPLATE = 0x8101000A, 0x01C0000A, 0x01C0000C
UNLOCKED, LOCKED = 0x62072001, 0x62072801
"""TPMA_NV as Debian's swtpm_setup leaves it without and with --lock-nvram."""
PLATFORM = 0x4000000C
NV_LOCKED = 0x148


def test_a_new_tpm_as_swtpm_setup_makes_it_by_default() -> None:
    store, report = make(ProvisionOptions())
    assert report.outcome is Outcome.MADE
    assert [(key.role, key.algorithm, key.handle, key.new) for key in report.keys] == [
        ("EK", "rsa2048", 0x81010001, True),
        ("EK", "ecc_nist_p384", 0x81010016, True),
    ]
    assert (report.indices, report.files, report.notes) == ((), (), ())
    assert report.active_banks == ("sha256",)
    with looked_at(store) as tpm:
        assert tpm.persistent_handles() == {0x81010001, 0x81010016}
        assert tpm.nv_indices() == frozenset()
        assert {name for name, active in tpm.banks().items() if active} == {"sha256"}
        assert set(tpm.banks()) == set(report.available_banks)
        for key in report.keys:
            public = tpm.public_area(key.handle)
            assert public.fingerprint == key.fingerprint
            assert public.is_made_from(templates.endorsement_key(KeyAlgorithm(key.algorithm)).template)


def test_the_ek_is_the_primary_key_of_its_template() -> None:
    """So that who knows the template can make it again, and credentials are for the right key."""
    store, _ = make(P256)
    with looked_at(store) as tpm:
        key = templates.endorsement_key(KeyAlgorithm.ECC_P256)
        transient, public = tpm.create_primary(key.hierarchy, key.template)
        tpm.flush(transient)
        assert public == tpm.public_area(EK)


def test_certificates_are_asked_for_and_stored() -> None:
    signer = Signer()
    store, report = make(CERTIFIED, signer=signer)
    assert [(index.index, index.what, index.new) for index in report.indices] == [
        (CERTIFICATE, "EK certificate", True),
        (templates.PLATFORM_CERTIFICATE_INDEX, "platform certificate", True),
    ]
    assert [kind for kind, _ in signer.requests] == ["ek", "platform"]
    kinds = ("ek", "platform")
    with looked_at(store) as tpm:
        public = tpm.public_area(EK)
        for number, index in enumerate(report.indices):
            data = tpm.nv_read(index.index)
            assert len(data) == index.size
            found = x509.load_der_x509_certificate(data)
            assert found.subject.rfc4514_string() == f"CN={kinds[number]} {number + 1}"
            assert found.public_key() == public.key
            assert tpm.nv_index(index.index).attributes == UNLOCKED
    for _, request in signer.requests:
        assert isinstance(request, EkRequest)
        assert request.public_key == public.key
        assert (request.subject, request.allow_signing, request.decryption) == ("machine:1", False, True)
        assert request.specification == Specification("2.0", 0, request.specification.revision)
        assert request.specification.revision >= 138
        assert request.attributes == TpmAttributes("id:00001014", "swtpm", request.attributes.version)


def test_only_the_first_ek_has_a_platform_certificate() -> None:
    signer = Signer()
    keys = (KeyAlgorithm.ECC_P384, KeyAlgorithm.ECC_P256, KeyAlgorithm.ECC_P384)
    _, report = make(replace(CERTIFIED, endorsement_keys=keys), signer=signer)
    assert [kind for kind, _ in signer.requests] == ["ek", "platform", "ek"]
    assert [key.handle for key in report.keys] == [0x81010016, EK]
    assert [index.index for index in report.indices] == [0x01C00016, templates.PLATFORM_CERTIFICATE_INDEX, CERTIFICATE]


def test_a_certificate_longer_than_one_nv_command() -> None:
    store, report = make(CERTIFIED, signer=Signer(padding=1300))
    size = report.indices[0].size
    assert size > 1024
    with looked_at(store) as tpm:
        x509.load_der_x509_certificate(tpm.nv_read(CERTIFICATE))


def test_a_certificate_that_the_tpm_cannot_hold_is_an_error() -> None:
    store = MemoryStore()
    with pytest.raises(ProvisionError, match=r"store \d+ bytes in the NV index 0x01c0000a"):
        make(CERTIFIED, store, Signer(padding=3000))
    assert store.load(StateKind.PERMANENT) is None


@pytest.mark.parametrize(("lock", "attributes", "code"), [(False, UNLOCKED, 0), (True, LOCKED, NV_LOCKED)])
def test_lock_nvram(lock: bool, attributes: int, code: int) -> None:
    """A locked certificate stays locked: not even the platform writes it after the next start."""
    store, report = make(replace(CERTIFIED, lock_nvram=lock))
    assert {index.locked for index in report.indices} == {lock}
    write = c.authorized(0x137, (PLATFORM, CERTIFICATE), c.sized(b"x") + b"\0\0")
    with running(store) as execute:
        assert c.code(execute(write)) == code
    with looked_at(store) as tpm:
        assert tpm.nv_index(CERTIFICATE).attributes == attributes


def test_a_signing_ek_leaves_its_template() -> None:
    signer = Signer()
    options = replace(CERTIFIED, allow_signing=True, decryption=False, lock_nvram=True)
    store, report = make(options, signer=signer)
    assert [index.index for index in report.indices] == [
        TEMPLATE,
        CERTIFICATE,
        templates.PLATFORM_CERTIFICATE_INDEX,
    ]
    key = templates.endorsement_key(KeyAlgorithm.ECC_P256, allow_signing=True, decryption=False)
    with looked_at(store) as tpm:
        assert tpm.nv_read(TEMPLATE) == marshalled(key.template)
        assert tpm.nv_index(TEMPLATE).attributes == LOCKED
        assert tpm.public_area(EK).is_made_from(key.template)
    asked = [request for _, request in signer.requests if isinstance(request, EkRequest)]
    assert [(request.allow_signing, request.decryption) for request in asked] == [(True, False)] * 2


def test_device_identity_keys_and_their_certificates(tmp_path: Path) -> None:
    signer = DeviceSigner()
    options = replace(
        CERTIFIED,
        storage_key=KeyAlgorithm.ECC_P256,
        attestation_key=KeyAlgorithm.ECC_P384,
        device_identity_key=KeyAlgorithm.ECC_P256,
        certificate_directory=tmp_path,
    )
    store, report = make(options, signer=signer)
    assert [(key.role, key.handle) for key in report.keys] == [
        ("SRK", 0x81000001),
        ("EK", EK),
        ("IAK", 0x81020001),
        ("IDevID", 0x81020000),
    ]
    names = ["ek-secp256r1.crt", "iak-secp384r1.crt", "idevid-secp256r1.crt"]
    assert [path.name for path in report.files] == names
    with looked_at(store) as tpm:
        assert [tpm.nv_read(index) for index in (CERTIFICATE, 0x01C90100, 0x01C90200)] == [
            (tmp_path / name).read_bytes() for name in names
        ]
        keys = [tpm.public_area(handle).key for handle in (0x81020001, 0x81020000)]
    asked = [request for _, request in signer.requests if isinstance(request, DevIdRequest)]
    assert [request.kind for request in asked] == [DevIdKind.IAK, DevIdKind.IDEVID]
    assert [request.public_key for request in asked] == keys
    assert {request.ek_certificate for request in asked} == {(tmp_path / names[0]).read_bytes()}


@pytest.mark.parametrize(
    ("wanted", "active", "notes"),
    [
        (("sha384", "sha256"), {"sha256", "sha384"}, 0),
        (None, {"sha1", "sha256", "sha384", "sha512"}, 0),
        (("sha1", "sha3-512"), {"sha1"}, 1),
    ],
)
def test_pcr_banks(wanted: tuple[str, ...] | None, active: set[str], notes: int) -> None:
    store, report = make(replace(P256, pcr_banks=wanted))
    assert set(report.active_banks) == active
    assert len(report.notes) == notes
    with looked_at(store) as tpm:
        assert {name for name, is_active in tpm.banks().items() if is_active} == active


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (replace(P256, pcr_banks=("sha257",)), UsageError),
        (replace(P256, pcr_banks=("sha3-512",)), ProvisionError),
        (replace(P256, pcr_banks=()), ProvisionError),
        (replace(CERTIFIED, endorsement_keys=()), UsageError),
        (replace(CERTIFIED, attestation_key=KeyAlgorithm.ECC_P256), UsageError),
        (replace(P256, existing=Existing.RECONFIGURE), StateAbsentError),
        (replace(CERTIFIED, certificate_directory=Path("/nowhere")), ProvisionError),
    ],
)
def test_what_cannot_be_makes_no_tpm(options: ProvisionOptions, error: type[Exception]) -> None:
    store = MemoryStore()
    with pytest.raises(error):
        make(options, store)
    assert store.load(StateKind.PERMANENT) is None


def test_profiles() -> None:
    chosen = replace(P256, profile='{"Name":"custom"}')
    with pytest.raises(ProvisionError, match=r"libtpms 0\.9\.2 does not take the profile"):
        provision(MemoryStore(), chosen, None, FakeEngine)
    staged = StagedStore(MemoryStore(), keeps=False)
    newer = partial(FakeEngine, profiles=True)
    with powered(staged, newer, profile=chosen.profile, new=True):
        assert staged.stamp is not None
        assert staged.stamp.profile == "custom"


def test_certificates_need_a_signer() -> None:
    with pytest.raises(UsageError, match="nobody to sign"):
        provision(MemoryStore(), CERTIFIED, None, LibtpmsEngine)


def test_a_tpm_that_says_not_what_it_is_is_refused() -> None:
    with pytest.raises(EngineFailedError, match="description of itself"):
        provision(MemoryStore(), P256, None, FakeEngine)


def test_a_tpm_that_is_there_keeps_its_profile() -> None:
    store, _ = make(P256)
    _, report = make(replace(P256, existing=Existing.COMPLETE, profile='{"Name":"custom"}'), store)
    assert report.notes == ("the TPM that is there keeps its profile",)


# -- where a TPM is


def test_refused() -> None:
    store, _ = make(P256)
    before = store.load(StateKind.PERMANENT)
    with pytest.raises(StateError, match="there is a TPM"):
        make(P256, store)
    assert store.load(StateKind.PERMANENT) == before


def test_kept() -> None:
    store = plain_tpm()
    before = store.load(StateKind.PERMANENT)
    _, report = make(replace(CERTIFIED, existing=Existing.KEEP), store)
    assert report.outcome is Outcome.KEPT
    assert store.load(StateKind.PERMANENT) == before
    _, report = make(replace(P256, existing=Existing.KEEP))
    assert report.outcome is Outcome.MADE


def test_completed() -> None:
    """Nothing that is there is made again, and a second time there is nothing to do."""
    complete = replace(CERTIFIED, existing=Existing.COMPLETE)
    store, made = make(replace(P256, existing=Existing.COMPLETE), plain_tpm())
    assert made.outcome is Outcome.COMPLETED
    signer = Signer()
    _, report = make(complete, store, signer)
    assert report.outcome is Outcome.COMPLETED
    assert [(key.fingerprint, key.new) for key in report.keys] == [(made.keys[0].fingerprint, False)]
    assert [index.new for index in report.indices] == [True, True]
    before = store.load(StateKind.PERMANENT)
    _, report = make(complete, store, signer)
    assert report.outcome is Outcome.KEPT
    assert not any(index.new for index in report.indices)
    assert len(signer.requests) == 2
    assert store.load(StateKind.PERMANENT) == before


def test_replaced() -> None:
    store, before = make(CERTIFIED)
    store.commit({StateKind.VOLATILE: b"of the TPM that was here before"})
    _, report = make(replace(P256, existing=Existing.REPLACE), store)
    assert report.outcome is Outcome.REPLACED
    assert report.keys[0].fingerprint != before.keys[0].fingerprint
    assert store.load(StateKind.VOLATILE) is None
    with looked_at(store) as tpm:
        assert tpm.nv_indices() == frozenset()


def test_reconfigured() -> None:
    store, _ = make(P256)
    options = ProvisionOptions(existing=Existing.RECONFIGURE, pcr_banks=("sha1", "sha512"), ek_certificates=True)
    report = provision(store, options, None, LibtpmsEngine)
    assert (report.outcome, report.keys, report.indices) == (Outcome.RECONFIGURED, (), ())
    with looked_at(store) as tpm:
        assert {name for name, active in tpm.banks().items() if active} == {"sha1", "sha512"}
        assert tpm.persistent_handles() == {EK}
    assert provision(store, options, None, LibtpmsEngine).outcome is Outcome.KEPT


@pytest.mark.parametrize("existing", [Existing.COMPLETE, Existing.RECONFIGURE])
def test_a_suspended_tpm_is_left_alone(existing: Existing) -> None:
    store, _ = make(P256)
    store.commit({StateKind.VOLATILE: b"suspended"})
    with pytest.raises(StateError, match="suspended"):
        make(replace(P256, existing=existing), store)


def test_another_key_in_the_place_of_the_ek_is_an_error() -> None:
    store, _ = make(P256)
    with pytest.raises(ProvisionError, match="0x8101000a is no EK of the kind"):
        make(replace(P256, allow_signing=True, existing=Existing.COMPLETE), store)


def test_another_key_s_certificate_is_an_error() -> None:
    store, _ = make(P256)
    with looked_at(plain_tpm()) as other:
        key = templates.endorsement_key(KeyAlgorithm.ECC_P256)
        _, stranger = other.create_primary(key.hierarchy, key.template)
    with looked_at(store) as tpm:
        tpm.nv_store(CERTIFICATE, certificate(stranger.key, "stranger"), lock=False)
    with pytest.raises(ProvisionError, match="0x01c0000a holds no certificate of the TPM's EK"):
        make(replace(CERTIFIED, existing=Existing.COMPLETE), store)


def test_a_hierarchy_with_a_password_is_an_error_with_its_remedy() -> None:
    store = plain_tpm()
    with running(store) as execute:
        change = c.authorized(0x129, (0x4000000B,), c.sized(b"secret"))
        assert c.code(execute(change)) == 0
    with pytest.raises(ProvisionError, match=r"endorsement hierarchy.*has a password"):
        make(replace(P256, existing=Existing.COMPLETE), store)
