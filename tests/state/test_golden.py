"""The golden documents: unchanged, read through the ladder, and each with a TPM in it that runs on."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.crb.device import CrbDevice
from crbd.crb.effects import Execute
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import StateDowngradeError, StateSealedError, StateWrongKeyError
from crbd.state import crb, ladder
from crbd.state.compatibility import check_engine
from crbd.state.document import Document, check_complete, decode, encode, open_seal, verify
from crbd.state.kinds import StateKind
from crbd.state.sealing import Seal
from crbd.state.sections import Section
from tests.engine import commands as c
from tests.engine.conftest import MemoryStatePort

from . import samples as s
from .golden import make

FILES = sorted(make.HERE.glob("*.crbd"))
VERSIONS = [1, 2, 3]


def load(path: Path) -> Document:
    return decode(path.read_bytes(), [s.passphrase(make.PASSPHRASE)] if "sealed" in path.name else None, str(path))


def golden(version: int) -> Document:
    return load(make.HERE / f"v{version}-plain.crbd")


@pytest.fixture
def port() -> MemoryStatePort:
    return MemoryStatePort()


@pytest.fixture
def engine(port: MemoryStatePort) -> Iterator[LibtpmsEngine]:
    engine = LibtpmsEngine(port)
    yield engine
    engine.close()


def test_none_is_missing_and_none_was_changed() -> None:
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FILES}
    lines = [line.split() for line in (make.HERE / "SHA256SUMS").read_text().splitlines()]
    assert sums == {name: digest for digest, name in lines}
    assert set(sums) == {f"v{version}-{suite}.crbd" for version in VERSIONS for suite in ("plain", "sealed")}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_header_and_identity(path: Path) -> None:
    version = int(path.name[1])
    header = verify(path.read_bytes(), str(path))
    assert (header.format_version, header.oldest_reader, header.generation) == (version, version, version)
    assert header.sealed == ("sealed" in path.name)
    assert header.uuid == s.UUID_A
    document = load(path)
    assert document.identity.name == f"golden {version}"
    assert document.written == 1_700_000_000 + version
    check_complete(document, str(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_tpm_runs_on_it(path: Path, port: MemoryStatePort, engine: LibtpmsEngine) -> None:
    """Permanent and volatile state go to libtpms, registers to the device; what was under way is brought to its end."""
    document = load(path)
    for kind in (StateKind.PERMANENT, StateKind.VOLATILE):
        state = document.state(kind)
        assert state is not None
        check_engine(state, engine.version, str(path))
        port.states[kind] = state.data
    engine.start()
    assert not engine.was_manufactured
    measured = hashlib.sha256(bytes(32) + make.MEASURED).digest()
    assert c.pcr_value(engine.execute(c.pcr_read(make.PCR))) == measured
    assert document.crb is not None
    device = CrbDevice.thaw(make.CONFIGS[int(path.name[1])], crb.snapshot_of(document.crb))
    if document.identity.generation > 1:
        locality = {2: 0, 3: 2}[document.identity.generation]
        assert device.executing == Execute(make.COMMAND, locality)
        device.complete(engine.execute(make.COMMAND))
    answer = bytes(device.buffer)
    assert c.nv_value(answer[: int.from_bytes(answer[2:6], "big")]) == make.NV_VALUE


@pytest.mark.parametrize("version", VERSIONS)
def test_plain_and_sealed_hold_the_same(version: int) -> None:
    plain = golden(version)
    sealed = (make.HERE / f"v{version}-sealed.crbd").read_bytes()
    assert decode(sealed, [s.key()]) == plain
    with pytest.raises(StateSealedError):
        decode(sealed)
    with pytest.raises(StateWrongKeyError):
        decode(sealed, [s.other_key(), s.passphrase(b"wrong horse")])


@pytest.mark.parametrize("version", VERSIONS)
def test_what_was_read_is_written_again_byte_by_byte(version: int) -> None:
    """So what each version writes today is what it wrote when the file was made."""
    document = golden(version)
    assert encode(document, format_version=version) == (make.HERE / f"v{version}-plain.crbd").read_bytes()


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_document_is_written_on_in_the_newest_version(version: int) -> None:
    again = encode(golden(version))
    assert verify(again).format_version == 3
    assert decode(again) == golden(version)
    sealed = (make.HERE / f"v{version}-sealed.crbd").read_bytes()
    seal = open_seal(sealed, [s.key()])
    assert decode(encode(decode(sealed, seal), seal), [s.passphrase(make.PASSPHRASE)]) == decode(sealed, [s.key()])


# -- the ladder, step by step


def crb_section(state: crb.CrbState) -> tuple[Section, Section]:
    version, data = crb.encode(state)
    return Section("other", 5, b"left alone"), Section(crb.SECTION, version, data)


def test_each_step_up_and_down() -> None:
    newest = golden(2).crb
    assert newest is not None
    forms = {version: crb_section(crb.lower(newest, version)) for version in VERSIONS}
    assert [form[1].version for form in forms.values()] == VERSIONS
    assert ladder.v1_to_v2(forms[1]) == forms[2]
    assert ladder.v2_to_v3(forms[2]) == forms[3]
    assert ladder.v3_to_v2(forms[3]) == forms[2]
    assert ladder.v2_to_v1(forms[2]) == forms[1]
    for version in VERSIONS:
        assert ladder.climb(forms[version], version) == forms[3]
        assert ladder.descend(forms[3], version) == forms[version]
    assert set(ladder.UP) == {1, 2}
    assert set(ladder.DOWN) == {2, 3}


@pytest.mark.parametrize("version", [1, 2])
def test_downgrade_where_something_would_be_lost(version: int) -> None:
    """Five localities have no room in a page; a transfer in pieces neither; sealed or not."""
    with pytest.raises(StateDowngradeError, match="its registers are of 5 localities"):
        encode(golden(3), format_version=version)
    seal = Seal.create(s.UUID_A, [s.key()])
    with pytest.raises(StateDowngradeError, match="localities") as caught:
        encode(golden(3), seal, format_version=version)
    assert caught.value.remedy
    one = golden(2)
    assert one.crb is not None
    half = crb.CrbTransfer(executor=-1, command=b"half of a command", response=b"", offset=0)
    busy = dataclasses.replace(one, crb=dataclasses.replace(one.crb, transfer=half))
    with pytest.raises(StateDowngradeError, match="under way"):
        encode(busy, format_version=version)
    odd = dataclasses.replace(one, crb=dataclasses.replace(one.crb, buffer=b"", transfer=None))
    with pytest.raises(StateDowngradeError, match="no room in format version 2"):
        encode(odd, format_version=version)


def test_downgrade_without_registers_loses_nothing() -> None:
    document = dataclasses.replace(s.sample(), crb=None)
    for version in VERSIONS:
        data = encode(document, format_version=version)
        assert verify(data).format_version == version
        assert decode(data) == document
