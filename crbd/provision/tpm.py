"""The commands of provisioning, on ESAPI: our own types in and out, one error for whatever the TPM refuses.

Every command is authorized by an empty password, which the hierarchies of a new TPM have, and the platform hierarchy
of any TPM that was just started.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from crbd.errors import ProvisionError
from crbd.provision.options import BANK_NAMES, KeyAlgorithm
from crbd.provision.tcti import EngineTcti
from crbd.provision.templates import Hierarchy, Scheme, Template

if TYPE_CHECKING:
    from crbd.provision.signing import KeyPublic

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_public_key
from tpm2_pytss import (
    ESAPI,
    ESYS_TR,
    TCTI,
    TPM2_ALG,
    TPM2_CAP,
    TPM2_ECC,
    TPM2_PT_NV,
    TPM2_SU,
    TPM2B_NV_PUBLIC,
    TPM2B_PUBLIC,
    TPMA_NV,
    TPML_PCR_SELECTION,
    TPMS_ECC_PARMS,
    TPMS_ECC_POINT,
    TPMS_NV_PUBLIC,
    TPMS_PCR_SELECTION,
    TPMS_RSA_PARMS,
    TPMT_ECC_SCHEME,
    TPMT_KDF_SCHEME,
    TPMT_PUBLIC,
    TPMT_RSA_SCHEME,
    TPMT_SYM_DEF_OBJECT,
    TPMU_PUBLIC_ID,
    TPMU_PUBLIC_PARMS,
    TSS2_Exception,
)

_BANKS: Final = dict(
    zip(
        BANK_NAMES,
        (
            TPM2_ALG.SHA1,
            TPM2_ALG.SHA256,
            TPM2_ALG.SHA384,
            TPM2_ALG.SHA512,
            TPM2_ALG.SM3_256,
            TPM2_ALG.SHA3_256,
            TPM2_ALG.SHA3_384,
            TPM2_ALG.SHA3_512,
        ),
        strict=True,
    )
)
CERTIFICATE_ATTRIBUTES: Final = (
    TPMA_NV.PPWRITE
    | TPMA_NV.PPREAD
    | TPMA_NV.OWNERREAD
    | TPMA_NV.AUTHREAD
    | TPMA_NV.NO_DA
    | TPMA_NV.WRITEDEFINE
    | TPMA_NV.PLATFORMCREATE
)
"""Of an NV index with a certificate (EK Credential Profile; the same as swtpm_setup's): anybody reads it, only the
platform writes it, and once write-locked it stays so."""
_HASHES: Final = {"sha256": TPM2_ALG.SHA256, "sha384": TPM2_ALG.SHA384, "sha512": TPM2_ALG.SHA512}
_CURVES: Final = {
    KeyAlgorithm.ECC_P256: TPM2_ECC.NIST_P256,
    KeyAlgorithm.ECC_P384: TPM2_ECC.NIST_P384,
    KeyAlgorithm.ECC_P521: TPM2_ECC.NIST_P521,
}
_RSA_BITS: Final = {KeyAlgorithm.RSA_2048: 2048, KeyAlgorithm.RSA_3072: 3072, KeyAlgorithm.RSA_4096: 4096}
_HIERARCHIES: Final = {Hierarchy.OWNER: ESYS_TR.OWNER, Hierarchy.ENDORSEMENT: ESYS_TR.ENDORSEMENT}
_ALL_PCRS: Final = b"\xff\xff\xff"
_NO_PCRS: Final = bytes(3)
_MAX_LISTED: Final = 254
"""How many handles one TPM2_GetCapability is asked for."""
_REMEDIES: Final = {
    0x08E: "a hierarchy of this TPM has a password: clear the TPM (tpm2_clear), or make a new one",
    0x0A2: "a hierarchy of this TPM has a password: clear the TPM (tpm2_clear), or make a new one",
    0x084: "this libtpms, or the profile of this TPM, does not have it: choose another",
    0x0A6: "this libtpms, or the profile of this TPM, does not have it: choose another",
    0x095: "it is too large for this libtpms: have the signer leave something out",
    0x14B: "the TPM has no room for more: make fewer",
}
"""By response codes without the numbers of parameters and sessions (Part 2, 6.6.3): TPM_RC_AUTH_FAIL, BAD_AUTH, VALUE,
CURVE, SIZE, NV_SPACE."""


@dataclass(frozen=True, slots=True)
class PublicArea:
    """The public part of a key in the TPM."""

    marshalled: bytes
    """TPMT_PUBLIC, big-endian."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public area, hexadecimal."""
        return hashlib.sha256(self.marshalled).hexdigest()

    @property
    def spki(self) -> bytes:
        """The key alone, as a SubjectPublicKeyInfo in DER."""
        return bytes(_unmarshalled(self.marshalled).to_der())

    @property
    def key(self) -> KeyPublic:
        """The key alone, as cryptography has it."""
        key = load_der_public_key(self.spki)
        if not isinstance(key, RSAPublicKey | EllipticCurvePublicKey):
            raise ProvisionError(f"the TPM made a key of the type {type(key).__name__}", "use another libtpms")
        return key

    def is_made_from(self, template: Template) -> bool:
        """Whether it differs from the template in nothing but the key itself."""
        return _without_key(self.marshalled) == _without_key(marshalled(template))


@dataclass(frozen=True, slots=True)
class NvIndex:
    """A defined NV index."""

    index: int
    size: int
    """Bytes."""
    attributes: int
    """TPMA_NV."""

    @property
    def written(self) -> bool:
        """Whether it holds anything."""
        return bool(self.attributes & TPMA_NV.WRITTEN)

    @property
    def locked(self) -> bool:
        """Whether it is write-locked."""
        return bool(self.attributes & TPMA_NV.WRITELOCKED)


class Tpm:
    """A started TPM. A context manager. Methods raise ProvisionError where the TPM refuses."""

    def __init__(self, tcti: TCTI) -> None:
        """Any TCTI will do: `Tpm.of_engine` makes one of a function, tpm2-pytss has others."""
        self._tcti = tcti
        with self._refusals("be opened"):
            self._esapi = ESAPI(tcti)
        self._chunk = 0

    @classmethod
    def of_engine(cls, execute: Callable[[bytes], bytes]) -> Self:
        """A TPM in this process; `execute` runs one command and returns the answer."""
        return cls(EngineTcti(execute))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._esapi.close()

    # -- keys

    def create_primary(self, hierarchy: Hierarchy, template: Template) -> tuple[int, PublicArea]:
        """TPM2_CreatePrimary: the key's ESAPI handle, to be flushed, and its public area."""
        with self._refusals(f"make a key {template.algorithm.value} in the {hierarchy.value} hierarchy"):
            public = TPM2B_PUBLIC(publicArea=_public_area(template))
            handle, made, *_ = self._esapi.create_primary(None, public, _HIERARCHIES[hierarchy])
            return handle, PublicArea(bytes(made.publicArea.marshal()))

    def persist(self, transient: int, handle: int) -> None:
        """TPM2_EvictControl: keep a transient key at a handle for good; then flush it."""
        with self._refusals(f"keep a key at 0x{handle:08x}"):
            self._esapi.evict_control(ESYS_TR.OWNER, transient, handle)
        self.flush(transient)

    def flush(self, transient: int) -> None:
        """TPM2_FlushContext: forget a transient key."""
        with self._refusals("forget a transient key"):
            self._esapi.flush_context(transient)

    def public_area(self, handle: int) -> PublicArea:
        """TPM2_ReadPublic of a persistent key."""
        with self._refusals(f"show the key at 0x{handle:08x}"):
            public, *_ = self._esapi.read_public(self._esapi.tr_from_tpmpublic(handle))
            return PublicArea(bytes(public.publicArea.marshal()))

    def persistent_handles(self) -> frozenset[int]:
        """The handles of all persistent keys."""
        return self._handles(0x81000000)

    # -- NV

    def nv_indices(self) -> frozenset[int]:
        """All NV indices that are defined."""
        return self._handles(0x01000000)

    def nv_index(self, index: int) -> NvIndex:
        """TPM2_NV_ReadPublic of an index that is defined."""
        with self._refusals(f"show the NV index 0x{index:08x}"):
            public, _ = self._esapi.nv_read_public(self._esapi.tr_from_tpmpublic(index))
            area = public.nvPublic
            return NvIndex(index, int(area.dataSize), int(area.attributes))

    def nv_read(self, index: int) -> bytes:
        """All of an index, as far as the platform, the owner or anybody may read it."""
        found = self.nv_index(index)
        with self._refusals(f"show what the NV index 0x{index:08x} holds"):
            handle = self._esapi.tr_from_tpmpublic(index)
            reader = handle
            if found.attributes & TPMA_NV.PPREAD:
                reader = ESYS_TR.PLATFORM
            elif found.attributes & TPMA_NV.OWNERREAD:
                reader = ESYS_TR.OWNER
            data = b""
            while len(data) < found.size:
                size = min(self._chunk_size(), found.size - len(data))
                data += bytes(self._esapi.nv_read(handle, size, len(data), reader))
            return data

    def nv_store(self, index: int, data: bytes, *, lock: bool) -> None:
        """Define an index with `CERTIFICATE_ATTRIBUTES`, as long as the data, write it, and lock it if wanted."""
        with self._refusals(f"store {len(data)} bytes in the NV index 0x{index:08x}"):
            public = TPMS_NV_PUBLIC(
                nvIndex=index, nameAlg=TPM2_ALG.SHA256, attributes=CERTIFICATE_ATTRIBUTES, dataSize=len(data)
            )
            handle = self._esapi.nv_define_space(None, TPM2B_NV_PUBLIC(nvPublic=public), ESYS_TR.PLATFORM)
            for offset in range(0, len(data), self._chunk_size()):
                piece = data[offset : offset + self._chunk_size()]
                self._esapi.nv_write(handle, piece, offset, ESYS_TR.PLATFORM)
            if lock:
                self._esapi.nv_write_lock(handle, ESYS_TR.PLATFORM)

    # -- PCR banks, end

    def banks(self) -> dict[str, bool]:
        """The names of the PCR banks that the TPM has, and whether each is active."""
        with self._refusals("show its PCR banks"):
            _, found = self._esapi.get_capability(TPM2_CAP.PCRS, 0, 64)
            names = {int(number): name for name, number in _BANKS.items()}
            return {
                names.get(int(bank.hash), f"0x{int(bank.hash):04x}"): any(bytes(bank.pcrSelect))
                for bank in found.data.assignedPCR
            }

    def allocate_banks(self, active: frozenset[str]) -> None:
        """TPM2_PCR_Allocate: all PCRs in these banks and none in the others, from the next start on."""
        with self._refusals(f"activate the PCR banks {', '.join(sorted(active))}"):
            selections = [
                TPMS_PCR_SELECTION(
                    hash=_BANKS[name], sizeofSelect=3, pcrSelect=_ALL_PCRS if name in active else _NO_PCRS
                )
                for name in self.banks()
            ]
            done, *_ = self._esapi.pcr_allocate(TPML_PCR_SELECTION(selections))
        if not done:
            raise ProvisionError(f"the TPM has no room for the PCR banks {', '.join(sorted(active))}", "choose fewer")

    def shutdown(self) -> None:
        """TPM2_Shutdown(CLEAR)."""
        with self._refusals("be shut down"):
            self._esapi.shutdown(TPM2_SU.CLEAR)

    # -- within

    def _handles(self, first: int) -> frozenset[int]:
        with self._refusals(f"list its handles from 0x{first:08x}"):
            found: set[int] = set()
            more, following = True, first
            while more:
                more, capability = self._esapi.get_capability(TPM2_CAP.HANDLES, following, _MAX_LISTED)
                handles = [int(handle) for handle in capability.data.handles]
                found.update(handle for handle in handles if handle >> 24 == first >> 24)
                more = bool(more and handles)
                following = max(handles, default=0) + 1
            return frozenset(found)

    def _chunk_size(self) -> int:
        """Bytes that one NV command carries at most (TPM_PT_NV_BUFFER_MAX)."""
        if not self._chunk:
            _, found = self._esapi.get_capability(TPM2_CAP.TPM_PROPERTIES, TPM2_PT_NV.BUFFER_MAX, 1)
            self._chunk = int(found.data.tpmProperties[0].value)
        return self._chunk

    @contextmanager
    def _refusals(self, wanted: str) -> Iterator[None]:
        """Translates tpm2-tss's exception: into what its TCTI raised, or into ours: the TPM would not `wanted`."""
        try:
            yield
        except TSS2_Exception as error:
            if isinstance(self._tcti, EngineTcti) and self._tcti.raised is not None:
                raise self._tcti.raised from error
            remedy = _REMEDIES.get(int(error.error), "see the response code in TPM 2.0 Part 2, 6.6")
            raise ProvisionError(f"the TPM would not {wanted}: {error} (0x{int(error.rc):x})", remedy) from error


def marshalled(template: Template) -> bytes:
    """The template as TPMT_PUBLIC, big-endian: what a template's NV index holds."""
    return bytes(_public_area(template).marshal())


def _unmarshalled(public: bytes) -> TPMT_PUBLIC:
    area, _ = TPMT_PUBLIC.unmarshal(public)
    return area


def _without_key(public: bytes) -> bytes:
    area = _unmarshalled(public)
    if area.type == TPM2_ALG.RSA:
        area.unique.rsa = b""
    else:
        area.unique.ecc = TPMS_ECC_POINT(x=b"", y=b"")
    return bytes(area.marshal())


def _public_area(template: Template) -> TPMT_PUBLIC:
    algorithm = template.algorithm
    if template.aes_bits:
        symmetric = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.AES)
        symmetric.keyBits.aes, symmetric.mode.aes = template.aes_bits, TPM2_ALG.CFB
    else:
        symmetric = TPMT_SYM_DEF_OBJECT(algorithm=TPM2_ALG.NULL)
    name_hash = _HASHES[template.name_hash]
    if algorithm.is_rsa:
        kind = TPM2_ALG.RSA
        scheme = TPMT_RSA_SCHEME(scheme=TPM2_ALG.NULL)
        if template.scheme is Scheme.RSAPSS:
            scheme = TPMT_RSA_SCHEME(scheme=TPM2_ALG.RSAPSS)
            scheme.details.rsapss.hashAlg = name_hash
        detail = TPMS_RSA_PARMS(symmetric=symmetric, scheme=scheme, keyBits=_RSA_BITS[algorithm], exponent=0)
        parameters, unique = TPMU_PUBLIC_PARMS(rsaDetail=detail), TPMU_PUBLIC_ID(rsa=template.unique)
    else:
        kind = TPM2_ALG.ECC
        scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.NULL)
        if template.scheme is Scheme.ECDSA:
            scheme = TPMT_ECC_SCHEME(scheme=TPM2_ALG.ECDSA)
            scheme.details.ecdsa.hashAlg = name_hash
        none = TPMT_KDF_SCHEME(scheme=TPM2_ALG.NULL)
        detail = TPMS_ECC_PARMS(symmetric=symmetric, scheme=scheme, curveID=_CURVES[algorithm], kdf=none)
        point = TPMS_ECC_POINT(x=template.unique, y=template.unique_y)
        parameters, unique = TPMU_PUBLIC_PARMS(eccDetail=detail), TPMU_PUBLIC_ID(ecc=point)
    return TPMT_PUBLIC(
        type=kind,
        nameAlg=name_hash,
        objectAttributes=int(template.attributes),
        authPolicy=template.policy,
        parameters=parameters,
        unique=unique,
    )
