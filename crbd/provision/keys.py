"""The keys and certificates of a provisioned TPM, each made if it is not there.

What is there is judged, not trusted: a key at a standard handle must be the one that the template makes, a certificate
must be one of the key that it stands beside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from crbd.errors import ProvisionError
from crbd.provision.report import MadeKey, WrittenIndex
from crbd.provision.templates import PersistentKey
from crbd.provision.tpm import PublicArea, Tpm, marshalled

_OTHERWISE = "replace the TPM by a new one, or ask for another key"


@dataclass(slots=True)
class Work:
    """What is done to one TPM, and what of it is to be reported."""

    tpm: Tpm
    lock_nvram: bool
    keys: list[MadeKey] = field(default_factory=list)
    indices: list[WrittenIndex] = field(default_factory=list)
    certificates: dict[str, bytes] = field(default_factory=dict)
    """DER by the name of the file that a copy would have."""

    @property
    def changed(self) -> bool:
        """Whether anything was made."""
        return any(key.new for key in self.keys) or any(index.new for index in self.indices)

    def key(self, wanted: PersistentKey) -> PublicArea:
        """The key at its handle, made and made persistent if nothing is there.

        Raises ProvisionError where another key is there.
        """
        new = wanted.handle not in self.tpm.persistent_handles()
        if new:
            transient, public = self.tpm.create_primary(wanted.hierarchy, wanted.template)
            self.tpm.persist(transient, wanted.handle)
        else:
            public = self.tpm.public_area(wanted.handle)
            if not public.is_made_from(wanted.template):
                raise ProvisionError(
                    f"the key at 0x{wanted.handle:08x} is no {wanted.role} of the kind that was asked for", _OTHERWISE
                )
        algorithm = wanted.template.algorithm.value
        self.keys.append(MadeKey(wanted.role, algorithm, wanted.handle, public.fingerprint, new))
        return public

    def template(self, wanted: PersistentKey) -> None:
        """The key's template in NV: without it nobody could make the key again."""
        assert wanted.template_index is not None
        self._store(wanted.template_index, f"{wanted.role} template", lambda: marshalled(wanted.template))

    def certificate(self, index: int, what: str, public: PublicArea, issue: Callable[[], bytes]) -> bytes:
        """The certificate in NV, as DER; issued if the index is not there.

        Raises ProvisionError where another key's is there, and what `issue` raises.
        """
        data = self._store(index, f"{what} certificate", issue)
        if not certifies(data, public):
            raise ProvisionError(f"the NV index 0x{index:08x} holds no certificate of the TPM's {what} key", _OTHERWISE)
        return data

    def platform_certificate(self, index: int, issue: Callable[[], bytes]) -> None:
        """The same for the platform certificate, which is of no key of its own."""
        self._store(index, "platform certificate", issue)

    def _store(self, index: int, what: str, produce: Callable[[], bytes]) -> bytes:
        if index in self.tpm.nv_indices():
            data = self.tpm.nv_read(index)
            self.indices.append(WrittenIndex(index, what, len(data), self.tpm.nv_index(index).locked, new=False))
            return data
        data = produce()
        self.tpm.nv_store(index, data, lock=self.lock_nvram)
        self.indices.append(WrittenIndex(index, what, len(data), self.lock_nvram, new=True))
        return data


def certifies(certificate: bytes, public: PublicArea) -> bool:
    """Whether this is a certificate (X.509, DER) of that key."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
        return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo) == public.spki
    except ValueError:
        return False


def write_copies(directory: Path, certificates: dict[str, bytes]) -> tuple[Path, ...]:
    """Write certificates to files; they are readable by all. Raises ProvisionError."""
    written = []
    for name, data in certificates.items():
        path = directory / name
        try:
            path.write_bytes(data)
        except OSError as error:
            raise ProvisionError(
                f"{path} cannot be written: {error.strerror}", "name a directory that is there and writable"
            ) from error
        written.append(path)
    return tuple(written)
