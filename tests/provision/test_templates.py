"""The templates against their derivation, against tpm2-pytss's own, and in the TPM."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import pytest
from tpm2_pytss.utils import NoSuchIndex, create_ek_template

from crbd.errors import ProvisionError
from crbd.provision import templates
from crbd.provision.options import KeyAlgorithm
from crbd.provision.templates import Attribute, PersistentKey, Scheme
from crbd.provision.tpm import Tpm, marshalled

from .tpms import looked_at, plain_tpm

PYTSS_NAMES = {
    0x81010001: "L-1",
    0x8101000A: "L-2",
    0x81010012: "H-1",
    0x81010014: "H-2",
    0x81010016: "H-3",
    0x81010018: "H-4",
    0x8101001C: "H-6",
    0x8101001E: "H-7",
}
POLICY_SECRET, POLICY_OR, POLICY_AUTHORIZE_NV = (bytes.fromhex(f"{code:08x}") for code in (0x151, 0x171, 0x192))
RH_ENDORSEMENT = bytes.fromhex("4000000b")
HASHES = {"sha256": (0x000B, 0x01C07F01), "sha384": (0x000C, 0x01C07F02), "sha512": (0x000D, 0x01C07F03)}
"""TPM_ALG_ID, and the NV index of the policy that the EK Credential Profile reserves."""
POLICY_INDEX_ATTRIBUTES = 0x220F1008


@pytest.fixture(scope="module")
def tpm() -> Iterator[Tpm]:
    with looked_at(plain_tpm()) as found:
        yield found


def extended(name: str, *parts: bytes) -> bytes:
    return hashlib.new(name, b"".join(parts)).digest()


def policy_a(name: str) -> bytes:
    """TPM2_PolicySecret with the endorsement hierarchy and no policyRef (Part 3, 23.4)."""
    zeros = bytes(hashlib.new(name).digest_size)
    return extended(name, extended(name, zeros, POLICY_SECRET, RH_ENDORSEMENT))


def policy_b(name: str) -> bytes:
    """TPM2_PolicyOR of policy A and TPM2_PolicyAuthorizeNV with the reserved index (Part 3, 23.6 and 23.22)."""
    algorithm, index = HASHES[name]
    size = hashlib.new(name).digest_size
    public = index.to_bytes(4, "big") + algorithm.to_bytes(2, "big") + POLICY_INDEX_ATTRIBUTES.to_bytes(4, "big")
    public += size.to_bytes(2, "big") + policy_a(name) + (size + 2).to_bytes(2, "big")
    index_name = algorithm.to_bytes(2, "big") + extended(name, public)
    policy_c = extended(name, bytes(size), POLICY_AUTHORIZE_NV, index_name)
    return extended(name, bytes(size), POLICY_OR, policy_a(name), policy_c)


def test_policies_are_what_they_stand_for() -> None:
    assert policy_a("sha256") == templates.POLICY_A
    assert {name: policy_b(name) for name in HASHES} == templates.POLICY_B


def test_standard_endorsement_keys_are_tpm2_pytss_s() -> None:
    keys = templates.every_endorsement_key()
    assert {key.handle for key in keys} == PYTSS_NAMES.keys()
    for key in keys:
        asked: list[int] = []

        def read(index: int, asked: list[int] = asked) -> bytes:
            asked.append(index)
            if len(asked) == 1:
                return b"certificate"
            raise NoSuchIndex(index)

        _, theirs = create_ek_template(PYTSS_NAMES[key.handle], read)
        assert marshalled(key.template) == theirs.publicArea.marshal()
        assert key.certificate_index == asked[0]
        assert key.template_index == asked[1]


@pytest.mark.parametrize(
    ("decryption", "uses"), [(True, Attribute.SIGN | Attribute.DECRYPT), (False, Attribute.SIGN)], ids=["both", "sign"]
)
@pytest.mark.parametrize("algorithm", [KeyAlgorithm.RSA_2048, KeyAlgorithm.ECC_P384])
def test_signing_endorsement_keys(algorithm: KeyAlgorithm, decryption: bool, uses: Attribute, tpm: Tpm) -> None:
    plain = templates.endorsement_key(algorithm)
    key = templates.endorsement_key(algorithm, allow_signing=True, decryption=decryption)
    assert key.handle == plain.handle
    changed = Attribute.SIGN | Attribute.DECRYPT | Attribute.RESTRICTED
    assert key.template.attributes & changed == uses
    assert key.template.attributes & ~changed == plain.template.attributes & ~changed
    assert key.template.aes_bits == 0
    check_made(key, tpm)


SUPPORTED = [algorithm for algorithm in KeyAlgorithm if algorithm is not KeyAlgorithm.RSA_4096]


@pytest.mark.parametrize("algorithm", SUPPORTED)
def test_every_kind_of_key_is_made(algorithm: KeyAlgorithm, tpm: Tpm) -> None:
    for key in (
        templates.endorsement_key(algorithm),
        templates.endorsement_key(algorithm, high_range=True),
        templates.storage_key(algorithm),
        templates.attestation_key(algorithm),
        templates.device_identity_key(algorithm),
    ):
        check_made(key, tpm)


def check_made(key: PersistentKey, tpm: Tpm) -> None:
    """The TPM makes it, keeps it, and it is the one that was asked for and no other."""
    transient, public = tpm.create_primary(key.hierarchy, key.template)
    assert public.is_made_from(key.template)
    other = templates.endorsement_key(key.template.algorithm, high_range=True, allow_signing=True, decryption=False)
    assert public.is_made_from(other.template) is (key.template == other.template)
    tpm.flush(transient)


@pytest.mark.parametrize(
    ("code", "remedy"), [(0x2C4, "choose another"), (0x9A2, "has a password"), (0x14B, "no room"), (0x101, "Part 2")]
)
def test_what_the_tpm_refuses_is_an_error_with_its_remedy(code: int, remedy: str) -> None:
    answer = bytes.fromhex(f"80010000000a{code:08x}")
    key = templates.endorsement_key(KeyAlgorithm.ECC_P256)
    with (
        Tpm.of_engine(lambda command: answer) as refusing,
        pytest.raises(ProvisionError, match=rf"ecc_nist_p256 in the endorsement.*\(0x{code:x}\): .*{remedy}"),
    ):
        refusing.create_primary(key.hierarchy, key.template)


def test_the_storage_root_key_is_the_one_of_tpm2_tools_and_swtpm_setup() -> None:
    template = templates.storage_key(KeyAlgorithm.ECC_P256).template
    assert (template.attributes, template.policy, template.aes_bits) == (0x30472, b"", 128)
    assert template.unique == template.unique_y == bytes(32)


def test_device_keys_sign_and_are_told_apart() -> None:
    iak = templates.attestation_key(KeyAlgorithm.RSA_2048)
    idevid = templates.device_identity_key(KeyAlgorithm.RSA_2048)
    assert (iak.template.attributes, idevid.template.attributes) == (0x500F2, 0x400F2)
    assert (iak.template.scheme, idevid.template.scheme) == (Scheme.RSAPSS, Scheme.NONE)
    assert (iak.handle, idevid.handle) == (0x81020001, 0x81020000)
    for policies in (templates.IAK_POLICY, templates.IDEVID_POLICY):
        assert {name: len(policy) for name, policy in policies.items()} == {
            name: hashlib.new(name).digest_size for name in HASHES
        }
