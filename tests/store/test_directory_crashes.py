"""swtpm's directory layout against power cuts: every prefix of what a commit asks the system for, and every outcome.

What is modelled: the contents of a file are certain once it was synced; before that it may hold nothing, a part, or
zeros. What changes the directory (a new name, a rename, a removal) is whole or did not happen, each for itself, until
the directory is synced.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crbd.state.kinds import StateKind
from crbd.state.swtpm import encode_file
from crbd.store.directory import open_directory

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE
Changes = Mapping[StateKind, bytes | None]
Files = dict[str, bytes]


@dataclass(slots=True)
class Contents:
    """Of one file: what was written, and whether that is certain."""

    data: bytes = b""
    synced: bool = False

    def outcomes(self) -> list[bytes]:
        if self.synced:
            return [self.data]
        return [b"", self.data[: len(self.data) // 2], bytes(len(self.data)), self.data]


@dataclass(frozen=True, slots=True)
class Naming:
    """One change of the directory: `name` now leads to `contents` (None: to nothing), and `former` to nothing."""

    name: str
    contents: Contents | None
    former: str | None = None


@dataclass(slots=True)
class Model:
    """The directory as the disk may hold it."""

    names: dict[str, Contents] = field(default_factory=dict)
    """For certain."""
    pending: list[Naming] = field(default_factory=list)

    def view(self) -> dict[str, Contents]:
        return self._after(self.pending)

    def crashes(self) -> Iterator[Files]:
        """Every directory a power cut may leave."""
        for taken in itertools.product((False, True), repeat=len(self.pending)):
            names = self._after([naming for naming, done in zip(self.pending, taken, strict=True) if done])
            for outcome in itertools.product(*(contents.outcomes() for contents in names.values())):
                yield dict(zip(names, outcome, strict=True))

    def sync(self) -> None:
        self.names, self.pending = self.view(), []

    def _after(self, namings: list[Naming]) -> dict[str, Contents]:
        names = dict(self.names)
        for naming in namings:
            if naming.former is not None:
                names.pop(naming.former, None)
            names.pop(naming.name, None)
            if naming.contents is not None:
                names[naming.name] = naming.contents
        return names


class Recorder:
    """Between a store and the system: lets every call happen, plays it in the model, and tells `on_event` of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, on_event: Callable[[Model], None]) -> None:
        self.model = Model()
        self._on_event = on_event
        self._opened: dict[int, Contents | None] = {}
        """By descriptor; None is the directory."""
        self._real = {name: getattr(os, name) for name in ("open", "write", "fsync", "replace", "unlink")}
        for name in self._real:
            monkeypatch.setattr(os, name, getattr(self, name))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor: int = self._real["open"](path, flags, mode)
        if flags & os.O_DIRECTORY:
            self._opened[descriptor] = None
        elif path.name == ".lock":
            pass
        else:
            assert flags & os.O_TRUNC, "what was there before is of no importance"
            self._opened[descriptor] = Contents()
            self._rename(Naming(path.name, self._opened[descriptor]))
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        written: int = self._real["write"](descriptor, data)
        contents = self._opened[descriptor]
        assert contents is not None
        contents.data += data[:written]
        contents.synced = False
        self._on_event(self.model)
        return written

    def fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        contents = self._opened[descriptor]
        if contents is None:
            self.model.sync()
        else:
            contents.synced = True
        self._on_event(self.model)

    def replace(self, source: Path, target: Path) -> None:
        self._real["replace"](source, target)
        self._rename(Naming(target.name, self.model.view()[source.name], former=source.name))

    def unlink(self, path: Path) -> None:
        self._real["unlink"](path)
        self._rename(Naming(path.name, None))

    def _rename(self, naming: Naming) -> None:
        self.model.pending.append(naming)
        self._on_event(self.model)


COMMITS: list[Changes] = [
    {PERMANENT: b"one"},
    {PERMANENT: b"two", VOLATILE: b"v"},
    {VOLATILE: None},
    {PERMANENT: b"three", VOLATILE: b"w"},
    {PERMANENT: b"four", VOLATILE: None},
]


def test_every_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each, every kind of state is as last acknowledged or as asked for since; nothing is unreadable."""
    (tmp_path / "state").mkdir()
    acknowledged: dict[StateKind, bytes | None] = {PERMANENT: None, VOLATILE: None}
    asked: Changes = {}
    survivors: list[tuple[Files, Changes, Changes]] = []

    def crash(model: Model) -> None:
        survivors.extend((files, dict(acknowledged), dict(asked)) for files in model.crashes())

    with monkeypatch.context() as patches:
        Recorder(patches, crash)
        store = open_directory(tmp_path / "state", create=False)
        for asked in COMMITS:
            store.commit(asked)
            acknowledged |= asked
        store.close()

    outcomes = set()
    for number, (files, before, wanted) in enumerate(survivors):
        place = tmp_path / str(number)
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
        store = open_directory(place, create=False)
        for kind, old in before.items():
            found = store.load(kind)
            assert found in (old, wanted.get(kind, old)), f"{files}: {kind.name} was {old!r}, {wanted} was asked for"
            outcomes.add((kind, old, found))
        store.close()
    assert {(PERMANENT, b"one", b"one"), (PERMANENT, b"one", b"two"), (PERMANENT, b"three", b"four")} <= outcomes
    assert {(VOLATILE, b"v", b"v"), (VOLATILE, b"v", None), (VOLATILE, None, b"w")} <= outcomes


def test_the_model_knows_what_a_torn_file_is() -> None:
    """Renamed without having been synced: the old file, the new one, and what nobody wants."""
    model = Model({"state": Contents(encode_file(b"old"), synced=True)})
    model.pending.append(Naming("state", Contents(b"new!"), former="new"))
    assert [files["state"] for files in model.crashes()] == [encode_file(b"old"), b"", b"ne", bytes(4), b"new!"]
