"""The independent reader in docs/ against golden files and fresh documents: two readings of one page agree."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crbd.state.document import Document, encode, verify
from crbd.state.header import DIGEST_SIZE
from crbd.state.sealing import Seal
from crbd.state.sections import decode_body

from . import samples as s
from .golden import make

READER = Path(__file__).resolve().parents[2] / "docs" / "read_state.py"
GOLDEN = sorted(make.HERE.glob("*.crbd"))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it away from the checkout, so that it cannot import crbd."""
    command = [sys.executable, "-I", str(READER), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")


def read(*arguments: str | Path) -> dict[str, Any]:
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, Path]:
    files = {"--key": tmp_path / "key", "--passphrase-file": tmp_path / "passphrase"}
    files["--key"].write_bytes(s.KEY)
    files["--passphrase-file"].write_bytes(make.PASSPHRASE)
    return files


def agree(found: dict[str, Any], data: bytes, plain: bytes) -> None:
    """What the reader printed is what crbd reads; `plain` is the same document unsealed."""
    header = verify(data)
    assert (found["uuid"], found["writer"]) == (str(header.uuid), header.writer)
    assert (found["format_version"], found["oldest_reader"]) == (header.format_version, header.oldest_reader)
    assert (found["generation"], found["suite"]) == (header.generation, header.suite)
    assert (found["writer_id"], found["written"]) == (header.writer_id.hex(), header.written)
    sections = decode_body(plain[69 + len(header.writer) : -DIGEST_SIZE], "f")
    assert found["sections"] == [
        {"name": each.name, "version": each.version, "may_skip": each.may_skip, "bytes": len(each.data)}
        for each in sections
    ]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.name)
def test_golden_files(path: Path, keys: dict[str, Path]) -> None:
    data = path.read_bytes()
    plain = (make.HERE / path.name.replace("sealed", "plain")).read_bytes()
    if data == plain:
        agree(read(path), data, plain)
    for option, file in keys.items():
        agree(read(path, option, file), data, plain)


def test_fresh_documents(tmp_path: Path, keys: dict[str, Path]) -> None:
    document: Document = s.sample()
    plain = encode(document)
    (tmp_path / "plain").write_bytes(plain)
    agree(read(tmp_path / "plain"), plain, plain)
    sealed = encode(document, Seal.create(s.UUID_A, [s.other_key(), s.key()]))
    (tmp_path / "sealed").write_bytes(sealed)
    extracted = tmp_path / "extracted"
    agree(read(tmp_path / "sealed", "--key", keys["--key"], "--extract", "session", extracted), sealed, plain)
    assert extracted.read_bytes() == bytes.fromhex("03 01 800f0000 7b010000")


def test_it_refuses_what_it_must(tmp_path: Path, keys: dict[str, Path]) -> None:
    sealed = encode(s.sample(), Seal.create(s.UUID_A, [s.other_key()]))
    forged = bytearray(encode(s.sample(), Seal.create(s.UUID_A, [s.key()])))
    forged[-50] ^= 1
    wrong = {
        b"x" * 100: "not a state document",
        encode(s.sample())[:-1]: "damaged",
        sealed: "no key fits",
        s.resummed(bytes(forged)): "not authentic",
        s.resummed(encode(s.sample())[:8] + b"\4\0\4\0" + encode(s.sample())[12:]): "newer reader",
    }
    for data, text in wrong.items():
        (tmp_path / "file").write_bytes(data)
        done = run(tmp_path / "file", "--key", keys["--key"])
        assert done.returncode == 1
        assert text in done.stderr


def test_it_is_a_page_long_and_stands_alone() -> None:
    source = READER.read_text()
    assert len(source.splitlines()) < 130
    imported = set(re.findall(r"^ *(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported - {"cryptography"} <= set(sys.stdlib_module_names)
