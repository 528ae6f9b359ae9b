"""What the provisioning tests share: a signer, provisioned stores, and a look at a TPM as its guest would find it."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from crbd.engine.libtpms import LibtpmsEngine
from crbd.provision.options import KeyAlgorithm, ProvisionOptions
from crbd.provision.provisioning import provision
from crbd.provision.report import ProvisionReport
from crbd.provision.signing import DevIdRequest, EkRequest
from crbd.provision.tpm import Tpm
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.store.memory import MemoryStore
from crbd.store.port import Store

if TYPE_CHECKING:
    from crbd.provision.signing import KeyPublic

P256 = ProvisionOptions(endorsement_keys=(KeyAlgorithm.ECC_P256,))
"""As little as there can be, made in milliseconds."""
CERTIFIED = replace(P256, ek_certificates=True, platform_certificate=True, subject="machine:1")


@dataclass
class Signer:
    """Issues the least certificate that certifies a key. It remembers what it was asked for."""

    requests: list[tuple[str, EkRequest | DevIdRequest]] = field(default_factory=list)
    padding: int = 0
    """Bytes of an extension that makes certificates larger."""

    def ek_certificate(self, request: EkRequest) -> bytes:
        return self._issue("ek", request)

    def platform_certificate(self, request: EkRequest) -> bytes:
        return self._issue("platform", request)

    def _issue(self, kind: str, request: EkRequest | DevIdRequest) -> bytes:
        self.requests.append((kind, request))
        return certificate(request.public_key, f"{kind} {len(self.requests)}", self.padding)


class DeviceSigner(Signer):
    """One that certifies device identity keys too."""

    def devid_certificate(self, request: DevIdRequest) -> bytes:
        return self._issue(request.kind.value, request)


def certificate(key: KeyPublic, name: str, padding: int = 0) -> bytes:
    """A certificate of the key, in DER, signed by somebody."""
    names = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    today = dt.datetime(2024, 1, 1, tzinfo=dt.UTC)
    builder = x509.CertificateBuilder(names, names, key, 1, today, today + dt.timedelta(days=1))
    if padding:
        nothing = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.3.6.1.4.1.99999"), bytes(padding))
        builder = builder.add_extension(nothing, critical=False)
    return builder.sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)


def make(
    options: ProvisionOptions, store: Store | None = None, signer: Signer | None = None
) -> tuple[Store, ProvisionReport]:
    """Provision a store (a new one in memory)."""
    store = MemoryStore() if store is None else store
    signer = Signer() if signer is None else signer
    return store, provision(store, options, signer, LibtpmsEngine)


@contextmanager
def running(store: Store, *, create: bool = False) -> Iterator[Callable[[bytes], bytes]]:
    """The TPM of a store, powered on and started as for a guest; yields what executes a command.

    What the guest changes is stored.
    """
    instance = Instance(LibtpmsEngine, store, InstanceOptions(startup=Startup.CLEAR, may_manufacture=create))
    try:
        instance.begin()
        yield instance.execute
    finally:
        instance.close()


@contextmanager
def looked_at(store: Store) -> Iterator[Tpm]:
    """The same, through `Tpm`."""
    with running(store) as execute, Tpm.of_engine(execute) as tpm:
        yield tpm


def plain_tpm() -> MemoryStore:
    """A store with a TPM that nobody provisioned."""
    store = MemoryStore()
    with running(store, create=True):
        pass
    return store
