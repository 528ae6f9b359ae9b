"""A directory tree that can lose its power: the calls a program makes of the system are recorded while they happen, and
every tree that a power cut may leave is built from them.

What is modelled, and no more than this is promised by POSIX: the contents of a file are certain as of its last sync;
what was written since may be there, or a part of it, or zeros in its place. What changes a directory (a new name, a
rename, a removal) is whole or did not happen, each for itself, until that directory is synced. Locks are not state.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

Tree = dict[Path, bytes | None]
"""By path below the root; None is a directory."""

LIMIT = 20_000
"""Trees of one crash; more is a mistake in the test, not a reason to sample."""


@dataclass(slots=True, eq=False)
class Contents:
    """Of one file, which may have several names: what reading returns, and what is certain."""

    data: bytes = b""
    certain: bytes = b""

    def outcomes(self) -> list[bytes]:
        if self.data == self.certain:
            return [self.data]
        size = len(self.data)
        half = self.data[: size // 2]
        return list(dict.fromkeys([self.certain, half, bytes(size), half + bytes(size - size // 2), self.data]))

    def write(self, data: bytes, offset: int) -> None:
        self.data = self.data[:offset].ljust(offset, b"\0") + data + self.data[offset + len(data) :]


@dataclass(frozen=True, slots=True)
class Naming:
    """One change of a directory: `name` now leads to `contents` (None: to a directory), and `former` to nothing.

    `gone`: `name` leads to nothing.
    """

    name: Path
    contents: Contents | None = None
    former: Path | None = None
    gone: bool = False


Names = dict[Path, Contents | None]


@dataclass(slots=True)
class Model:
    """The tree as the disk may hold it. Names are relative to the root."""

    names: Names = field(default_factory=dict)
    """For certain."""
    pending: list[Naming] = field(default_factory=list)

    def view(self) -> Names:
        return self._after(self.pending)

    def crashes(self) -> Iterator[Tree]:
        """Every tree a power cut may leave."""
        count = 0
        for taken in itertools.product((False, True), repeat=len(self.pending)):
            names = self._after([naming for naming, done in zip(self.pending, taken, strict=True) if done])
            # What lies in a directory that is not there is not there either.
            names = {name: found for name, found in names.items() if _is_reachable(name, names)}
            files = list({id(found): found for found in names.values() if found is not None}.values())
            for outcome in itertools.product(*(contents.outcomes() for contents in files)):
                count += 1
                assert count <= LIMIT
                chosen = dict(zip(map(id, files), outcome, strict=True))
                yield {name: None if found is None else chosen[id(found)] for name, found in names.items()}

    def sync(self, directory: Path) -> None:
        certain = [naming for naming in self.pending if naming.name.parent == directory]
        self.names = self._after(certain)
        self.pending = [naming for naming in self.pending if naming.name.parent != directory]

    def _after(self, namings: list[Naming]) -> Names:
        names = dict(self.names)
        for naming in namings:
            if naming.former is not None:
                names.pop(naming.former, None)
            names.pop(naming.name, None)
            if not naming.gone:
                names[naming.name] = naming.contents
        return names


def _is_reachable(name: Path, names: Names) -> bool:
    return all(parent in names for parent in name.parents if parent != Path())


class Recorder:
    """Between a program and the system: lets every call happen, plays it in the model, and tells `on_event` of it."""

    CALLS = ("open", "write", "pwrite", "pwritev", "fsync", "fdatasync", "replace", "rename", "link", "unlink", "mkdir")

    def __init__(self, patch: pytest.MonkeyPatch, root: Path, on_event: Callable[[Model], None]) -> None:
        self._root = root
        self.model = Model({path.relative_to(root): _contents(path) for path in sorted(root.rglob("*"))})
        self._on_event = on_event
        self._opened: dict[int, Path] = {}
        """The names under which descriptors were opened."""
        self._files: dict[int, Contents] = {}
        self._real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in self.CALLS}
        for name in self.CALLS:
            patch.setattr(os, name, getattr(self, name))

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        descriptor: int = self._real["open"](path, flags, mode)
        self._opened.pop(descriptor, None)
        self._files.pop(descriptor, None)
        name = self._name(path)
        if name is None or name.name == ".lock":
            return descriptor
        self._opened[descriptor] = name
        if not flags & os.O_DIRECTORY:
            known = self.model.view().get(name)
            if known is None:
                known = Contents()
                self._happens(Naming(name, known))
            elif flags & os.O_TRUNC:
                known.data = b""
            self._files[descriptor] = known
        return descriptor

    def write(self, descriptor: int, data: bytes) -> int:
        written: int = self._real["write"](descriptor, data)
        if contents := self._files.get(descriptor):
            contents.write(bytes(data[:written]), len(contents.data))
            self._on_event(self.model)
        return written

    def pwrite(self, descriptor: int, data: bytes, offset: int) -> int:
        written: int = self._real["pwrite"](descriptor, data, offset)
        if contents := self._files.get(descriptor):
            contents.write(bytes(data[:written]), offset)
            self._on_event(self.model)
        return written

    def pwritev(self, descriptor: int, pieces: Sequence[bytes], offset: int) -> int:
        return self.pwrite(descriptor, b"".join(pieces), offset)

    def fsync(self, descriptor: int) -> None:
        self._real["fsync"](descriptor)
        if contents := self._files.get(descriptor):
            contents.certain = contents.data
        elif descriptor in self._opened:
            self.model.sync(self._opened[descriptor])
        self._on_event(self.model)

    def fdatasync(self, descriptor: int) -> None:
        self.fsync(descriptor)

    def replace(self, source: Path, target: Path) -> None:
        self._real["replace"](source, target)
        old, new = self._name(source), self._name(target)
        assert old is not None
        assert new is not None
        assert old.parent == new.parent
        view = self.model.view()
        # Two names of one file: POSIX leaves both.
        if view.get(new) is None or view[new] is not view[old]:
            self._happens(Naming(new, view[old], former=old))

    def rename(self, source: Path, target: Path) -> None:
        self.replace(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._real["link"](source, target)
        old, new = self._name(source), self._name(target)
        assert old is not None
        assert new is not None
        self._happens(Naming(new, self.model.view()[old]))

    def unlink(self, path: Path) -> None:
        self._real["unlink"](path)
        if name := self._name(path):
            self._happens(Naming(name, gone=True))

    def mkdir(self, path: Path, mode: int = 0o777) -> None:
        self._real["mkdir"](path, mode)
        if name := self._name(path):
            self._happens(Naming(name))

    def _name(self, path: Path) -> Path | None:
        """Below the root; None for what is elsewhere."""
        path = Path(path).absolute()
        return path.relative_to(self._root) if path.is_relative_to(self._root) else None

    def _happens(self, naming: Naming) -> None:
        if naming.name.name == ".lock":
            return
        self.model.pending.append(naming)
        self._on_event(self.model)


def _contents(path: Path) -> Contents | None:
    if path.is_dir():
        return None
    data = path.read_bytes()
    return Contents(data, data)


def build(tree: Tree, place: Path) -> None:
    """What a crash left, below the directory `place`, which is made."""
    place.mkdir()
    for name, data in sorted(tree.items()):
        if data is None:
            (place / name).mkdir()
        else:
            (place / name).write_bytes(data)
