"""The recorded traces: readable, in one form, and as they were recorded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from .qemu_trace import Completed, Established, Read, Reset, Write, dump, load

VECTORS = Path(__file__).parent / "vectors"
PATHS = sorted(VECTORS.glob("*.json"))
SUMS = {name: digest for digest, name in map(str.split, (VECTORS / "SHA256SUMS").read_text().splitlines())}


def test_every_recorded_trace_is_there() -> None:
    assert {path.name for path in PATHS} == SUMS.keys()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_trace_never_changes(path: Path) -> None:
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SUMS[path.name]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_trace_reads_and_writes(path: Path) -> None:
    trace = load(path)
    assert dump(trace) == path.read_text(encoding="ascii")
    assert trace.steps[:2] == (Established(False), Reset())
    assert path.stem.startswith(trace.config.device)
    for step in trace.steps:
        match step:
            case Read(offset, value) | Write(offset, value):
                assert value
                assert 0 <= offset < 0x5000
            case Completed(response, command):
                assert int.from_bytes(response[2:6], "big") == len(response)
                assert (command is not None) == trace.config.scripted
