"""The TPM that Debian's swtpm_setup makes and the one that we make, side by side; and tpm2-tools on ours.

What is compared is everything but the keys themselves: persistent handles and the public areas there, NV indices and
their attributes, PCR banks, certificates field by field.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography import x509
from tpm2_pytss import TPM2_ALG, TPMS_ECC_POINT, TPMT_PUBLIC

from crbd.engine.libtpms import LibtpmsEngine
from crbd.provision.authority import AuthorityFiles, open_authority
from crbd.provision.options import Existing, KeyAlgorithm, ProvisionOptions
from crbd.provision.provisioning import provision
from crbd.provision.signing import PlatformAttributes
from crbd.store.layout import Layout, open_state
from tests.e2e.daemon import fresh_directory, tpm_daemon

from .tpms import looked_at

pytestmark = pytest.mark.e2e

FACTORY = ProvisionOptions(
    ek_certificates=True,
    platform_certificate=True,
    subject="machine:1",
    platform=PlatformAttributes("Fedora", "QEMU", "2.1"),
)
"""The options of swtpm_setup's call below; the platform is what Debian's swtpm-localca.options says."""


KEY_USAGE, SUBJECT_KEY_ID, AUTHORITY_KEY_ID = "2.5.29.15", "2.5.29.14", "2.5.29.35"


@dataclass(frozen=True)
class Certificate:
    """What a certificate says beside its key, its issuer, its numbers and its dates.

    Two differences are intended. Debian's certificates have no subject key identifier, which RFC 5280 recommends. And
    for EKs that may sign they claim the key usage of those that may not: `uses` is compared apart.
    """

    version: x509.Version
    subject: str
    extensions: dict[str, tuple[bool, object]]

    @classmethod
    def of(cls, der: bytes) -> Certificate:
        found = x509.load_der_x509_certificate(der)
        extensions = {one.oid.dotted_string: (one.critical, one.value) for one in found.extensions}
        extensions.pop(SUBJECT_KEY_ID, None)
        critical, identifier = extensions[AUTHORITY_KEY_ID]
        assert isinstance(identifier, x509.AuthorityKeyIdentifier)
        assert identifier.key_identifier
        extensions[AUTHORITY_KEY_ID] = (critical, "of the issuer")
        return cls(found.version, found.subject.rfc4514_string(), extensions)

    @property
    def uses(self) -> frozenset[str]:
        """The bits of the key usage that are set."""
        _, usage = self.extensions[KEY_USAGE]
        assert isinstance(usage, x509.KeyUsage)
        return frozenset(
            name for name in ("digital_signature", "key_encipherment", "key_agreement") if getattr(usage, name)
        )

    def without_uses(self) -> Certificate:
        critical, _ = self.extensions[KEY_USAGE]
        return replace(self, extensions=self.extensions | {KEY_USAGE: (critical, "of the key")})


@dataclass(frozen=True)
class Shape:
    """A TPM without its keys."""

    keys: dict[int, bytes]
    """Public areas by handle."""
    indices: dict[int, int]
    """Attributes by index."""
    templates: dict[int, bytes]
    certificates: dict[int, Certificate]
    active_banks: frozenset[str]


def shape_of(state: Path) -> Shape:
    store = open_state(state, create=False)
    try:
        with looked_at(store) as tpm:
            held = {index: tpm.nv_read(index) for index in tpm.nv_indices()}
            return Shape(
                {handle: without_key(tpm.public_area(handle).marshalled) for handle in tpm.persistent_handles()},
                {index: tpm.nv_index(index).attributes for index in tpm.nv_indices()},
                {index: data for index, data in held.items() if not data.startswith(b"\x30\x82")},
                {index: Certificate.of(data) for index, data in held.items() if data.startswith(b"\x30\x82")},
                frozenset(name for name, active in tpm.banks().items() if active),
            )
    finally:
        store.close()


def without_key(public: bytes) -> bytes:
    area, _ = TPMT_PUBLIC.unmarshal(public)
    if area.type == TPM2_ALG.RSA:
        area.unique.rsa = b""
    else:
        area.unique.ecc = TPMS_ECC_POINT(x=b"", y=b"")
    return bytes(area.marshal())


def swtpm_setup(place: Path, state: Path, *arguments: str) -> None:
    """Debian's, with an authority of its own below `place`."""
    state.mkdir(exist_ok=True)
    authority = place / "swtpm-ca"
    (place / "localca.conf").write_text(
        f"statedir = {authority}\nsigningkey = {authority}/key.pem\nissuercert = {authority}/cert.pem\n"
        f"certserial = {authority}/serial\n"
    )
    (place / "setup.conf").write_text(
        f"create_certs_tool= /usr/bin/swtpm_localca\ncreate_certs_tool_config = {place}/localca.conf\n"
        "create_certs_tool_options = /etc/swtpm-localca.options\nactive_pcr_banks = sha256\n"
    )
    command = ["/usr/bin/swtpm_setup", "--tpm2", "--tpm-state", str(state), "--config", str(place / "setup.conf")]
    done = subprocess.run([*command, *arguments], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


CERTIFIED = ("--vmid", "machine:1", "--create-ek-cert", "--create-platform-cert")
CASES = {
    "plain": (("--createek",), ProvisionOptions()),
    "certified": (CERTIFIED, FACTORY),
    "locked": ((*CERTIFIED, "--lock-nvram"), replace(FACTORY, lock_nvram=True)),
    "srk": (("--createek", "--create-spk"), ProvisionOptions(storage_key=KeyAlgorithm.RSA_2048)),
    "ecc srk": (("--createek", "--create-spk", "--ecc"), ProvisionOptions(storage_key=KeyAlgorithm.ECC_P384)),
    "rsa3072": (
        (*CERTIFIED, "--rsa-keysize", "3072"),
        replace(FACTORY, endorsement_keys=(KeyAlgorithm.RSA_3072, KeyAlgorithm.ECC_P384)),
    ),
    "signing": ((*CERTIFIED, "--allow-signing"), replace(FACTORY, allow_signing=True, decryption=False)),
    "signing and decrypting": (
        (*CERTIFIED, "--allow-signing", "--decryption"),
        replace(FACTORY, allow_signing=True),
    ),
    "banks": (
        ("--createek", "--pcr-banks", "sha1,sha512"),
        ProvisionOptions(pcr_banks=("sha1", "sha512")),
    ),
    "all banks": (("--createek", "--pcr-banks", "-"), ProvisionOptions(pcr_banks=None)),
}


def make_ours(place: Path, options: ProvisionOptions) -> Path:
    state = place / "ours"
    store = open_state(state, create=True, layout=Layout.SWTPM)
    try:
        provision(store, options, open_authority(AuthorityFiles.own(place / "ca")), LibtpmsEngine)
    finally:
        store.close()
    return state


@pytest.mark.parametrize("case", CASES)
def test_the_same_tpm_but_for_its_keys(case: str, tmp_path: Path) -> None:
    arguments, options = CASES[case]
    swtpm_setup(tmp_path, tmp_path / "theirs", *arguments)
    theirs, ours = shape_of(tmp_path / "theirs"), shape_of(make_ours(tmp_path, options))
    if options.allow_signing:
        assert {index: found.uses for index, found in ours.certificates.items()} == uses_of_signing_keys(options)
        theirs, ours = without_uses(theirs), without_uses(ours)
    assert ours == theirs


def uses_of_signing_keys(options: ProvisionOptions) -> dict[int, frozenset[str]]:
    rsa, ecc = {"digital_signature"}, {"digital_signature"}
    if options.decryption:
        rsa.add("key_encipherment")
        ecc.add("key_agreement")
    return {0x01C00002: frozenset(rsa), 0x01C08000: frozenset(rsa), 0x01C00016: frozenset(ecc)}


def without_uses(shape: Shape) -> Shape:
    return replace(shape, certificates={index: found.without_uses() for index, found in shape.certificates.items()})


def test_the_same_reconfigured(tmp_path: Path) -> None:
    """Ours by swtpm_setup, theirs by us."""
    swtpm_setup(tmp_path, tmp_path / "theirs", "--createek")
    ours = make_ours(tmp_path, ProvisionOptions())
    before = shape_of(ours)
    swtpm_setup(tmp_path, ours, "--reconfigure", "--pcr-banks", "sha1,sha384")
    store = open_state(tmp_path / "theirs", create=False)
    options = ProvisionOptions(existing=Existing.RECONFIGURE, pcr_banks=("sha1", "sha384"))
    provision(store, options, None, LibtpmsEngine)
    store.close()
    assert shape_of(ours) == shape_of(tmp_path / "theirs")
    assert shape_of(ours) == replace(before, active_banks=frozenset({"sha1", "sha384"}))


# -- tpm2-tools


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Path, str]]:
    """A directory with our authority in `ca`, and the TCTI of a daemon that serves a TPM that we made."""
    with fresh_directory() as place:
        options = replace(FACTORY, storage_key=KeyAlgorithm.ECC_P256, lock_nvram=True)
        make_ours(place, options).rename(place / "state")
        with tpm_daemon(place, create=False, tools=True) as daemon:
            yield place, f"swtpm:path={daemon.data}"


def run(served: tuple[Path, str], script: str) -> str:
    place, tcti = served
    environment = os.environ | {"TPM2TOOLS_TCTI": tcti}
    command = ["sh", "-ec", script]
    done = subprocess.run(command, check=False, cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_getekcertificate_finds_them(served: tuple[Path, str]) -> None:
    run(served, "tpm2_getekcertificate -o rsa.der -o ecc.der")
    run(served, "tpm2_nvread 0x1c00002 -o nv.der; cmp nv.der rsa.der")


@pytest.mark.parametrize(("index", "handle"), [("0x1c00002", "0x81010001"), ("0x1c00016", "0x81010016")])
def test_openssl_verifies_the_chain_and_the_key_is_the_tpm_s(index: str, handle: str, served: tuple[Path, str]) -> None:
    said = run(
        served,
        f"""
        tpm2_nvread {index} -o cert.der
        openssl x509 -inform DER -in cert.der -out cert.pem
        openssl verify -CAfile ca/root-cert.pem -untrusted ca/issuer-cert.pem cert.pem
        openssl x509 -in cert.pem -noout -pubkey > cert-key.pem
        tpm2_readpublic -c {handle} -f pem -o tpm-key.pem > readpublic
        openssl pkey -pubin -in tpm-key.pem -out tpm-key.pem2
        openssl pkey -pubin -in cert-key.pem -out cert-key.pem2
        cmp tpm-key.pem2 cert-key.pem2
        """,
    )
    assert said == "cert.pem: OK\n"


def test_createek_makes_the_persistent_key_again(served: tuple[Path, str]) -> None:
    """So that software which makes the EK itself, by the template, gets the one that is certified."""
    run(
        served,
        """
        tpm2_createek -c ek.ctx -G rsa -u again.pub
        tpm2_flushcontext -t
        tpm2_readpublic -c 0x81010001 -o kept.pub > readpublic
        cmp again.pub kept.pub
        """,
    )


def test_a_credential_for_the_ek_is_opened(served: tuple[Path, str]) -> None:
    said = run(
        served,
        """
        printf secret > secret
        tpm2_createprimary -C o -c primary.ctx > createprimary
        tpm2_flushcontext -t
        tpm2_readpublic -c 0x81010001 -o ek.pub > readpublic
        name=$(tpm2_readpublic -c primary.ctx | sed -n 's/^name: //p')
        tpm2_makecredential -T none -u ek.pub -s secret -n $name -o credential > makecredential
        tpm2_startauthsession --policy-session -S session.ctx
        tpm2_policysecret -S session.ctx -c e > policysecret
        tpm2_activatecredential -c primary.ctx -C 0x81010001 -i credential -P session:session.ctx -o opened > activate
        tpm2_flushcontext session.ctx
        tpm2_flushcontext -t
        cat opened
        """,
    )
    assert said == "secret"
