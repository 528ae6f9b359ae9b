"""What a TPM at rest can prove of itself: its endorsement and device identity keys, and the certificates in its NV.

Theory. The permanent state alone is copied into memory and a TPM started from the copy; so nothing is written, a
suspended machine's volatile state is left alone, and it does not matter whether a daemon has the state just then: these
keys do not change while a guest runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crbd.errors import ProvisionError, StateAbsentError
from crbd.provision.keys import certifies
from crbd.provision.provisioning import MakeEngine, powered
from crbd.provision.staging import StagedStore
from crbd.provision.templates import IAK_HANDLE, IDEVID_HANDLE
from crbd.provision.tpm import PublicArea, Tpm
from crbd.state.kinds import StateKind
from crbd.store.port import Store

_EK_HANDLES = range(0x81010000, 0x81020000)
_CERTIFICATE_INDICES = (range(0x01C00000, 0x01C10000), range(0x01C90000, 0x01CA0000))
"""Of EKs and platforms, and of device identity keys (TCG Registry of Reserved TPM 2.0 Handles and Localities)."""
_DEVICE_KEYS = {IAK_HANDLE: "IAK", IDEVID_HANDLE: "IDevID"}


@dataclass(frozen=True, slots=True)
class ShownKey:
    """A persistent key."""

    role: str
    handle: int
    public: PublicArea

    @property
    def algorithm(self) -> str:
        """`RSA 2048`, `secp384r1`."""
        key = self.public.key
        return f"RSA {key.key_size}" if isinstance(key, RSAPublicKey) else key.curve.name

    @property
    def spki_fingerprint(self) -> str:
        """SHA-256 of the SubjectPublicKeyInfo, hexadecimal: what tools outside of the TPM's world compare."""
        return hashlib.sha256(self.public.spki).hexdigest()

    @property
    def pem(self) -> str:
        """The public key."""
        return self.public.key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode("ascii")


@dataclass(frozen=True, slots=True)
class ShownCertificate:
    """A certificate in NV."""

    index: int
    der: bytes
    handle: int | None
    """Of the persistent key that it certifies; None where it is of none."""

    @property
    def parsed(self) -> x509.Certificate:
        """As cryptography has it."""
        return x509.load_der_x509_certificate(self.der)

    @property
    def pem(self) -> str:
        """The certificate."""
        return self.parsed.public_bytes(Encoding.PEM).decode("ascii")


@dataclass(frozen=True, slots=True)
class Identities:
    """All that was found, by handle and by index."""

    keys: tuple[ShownKey, ...]
    certificates: tuple[ShownCertificate, ...]
    unreadable: tuple[int, ...]
    """NV indices in the certificates' ranges that nobody but a guest may read."""


def read_identities(store: Store, make_engine: MakeEngine) -> Identities:
    """Read them from the TPM in `store`, which need not be locked and is not written. Raises OperatorError."""
    if store.load(StateKind.PERMANENT) is None:
        raise StateAbsentError(f"there is no TPM state in {store.name}", "check the path")
    staged = StagedStore(store, keeps=True)
    with powered(staged, make_engine, profile=None, new=False) as instance, Tpm.of_engine(instance.execute) as tpm:
        keys = tuple(_keys(tpm))
        certificates: list[ShownCertificate] = []
        unreadable: list[int] = []
        for index in sorted(tpm.nv_indices()):
            if not any(index in indices for indices in _CERTIFICATE_INDICES) or not tpm.nv_index(index).written:
                continue
            try:
                data = tpm.nv_read(index)
            except ProvisionError:
                unreadable.append(index)
                continue
            der = _certificate_in(data)
            if der is not None:
                of = next((key.handle for key in keys if certifies(der, key.public)), None)
                certificates.append(ShownCertificate(index, der, of))
        return Identities(keys, tuple(certificates), tuple(unreadable))


def _keys(tpm: Tpm) -> list[ShownKey]:
    found = []
    for handle in sorted(tpm.persistent_handles()):
        role = "EK" if handle in _EK_HANDLES else _DEVICE_KEYS.get(handle)
        if role is not None:
            found.append(ShownKey(role, handle, tpm.public_area(handle)))
    return found


def _certificate_in(data: bytes) -> bytes | None:
    """The certificate at the beginning of an NV index, which may be longer than it; None where there is none."""
    if len(data) < 4 or data[0] != 0x30 or data[1] != 0x82:
        return None
    der = data[: 4 + int.from_bytes(data[2:4], "big")]
    try:
        x509.load_der_x509_certificate(der)
    except ValueError:
        return None
    return der
