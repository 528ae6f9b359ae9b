"""A disk in memory that can lose its power: a `BlockFile` that records what is asked of it, and a replayer.

What is modelled, and no more than this is promised by POSIX and by disks:

- Between two syncs sectors (512 bytes) reach the disk in any order, each in any of the versions written meanwhile, or
  not at all; one on its way may be torn at any byte. The file's size is such a fact of its own.
- A sync that returns has brought everything; one that fails has brought anything, and what it did not bring is *lost*:
  no later sync brings it, though it can still be read until somebody looks at the disk itself (`settle`).
- A rename is whole or not there, and may be either until the directory is synced.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

SECTOR = 512
NOTHING = bytes(SECTOR)


@dataclass(frozen=True, slots=True)
class Write:
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Sync:
    succeeds: bool


@dataclass(frozen=True, slots=True)
class Rename:
    durable: bool
    """False when the name changes, true when the directory is synced."""


@dataclass(frozen=True, slots=True)
class Begin:
    """The store is asked to commit number `number`."""

    number: int


@dataclass(frozen=True, slots=True)
class Acknowledge:
    """The store said that commit `number` is durable."""

    number: int


Event = Write | Sync | Rename | Begin | Acknowledge


@dataclass(frozen=True, slots=True)
class Image:
    """What a disk holds after a crash. Sectors that are not listed are zeros."""

    sectors: dict[int, bytes]
    size: int
    named: bool

    def read(self, size: int, offset: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        first, last = offset // SECTOR, -(-(offset + size) // SECTOR)
        data = b"".join(self.sectors.get(number, NOTHING) for number in range(first, last))
        return data[offset - first * SECTOR :][:size]


@dataclass(slots=True)
class Uncertain:
    """What a sector may hold: `versions[0]` is the last that is certain, the others were written since, in order."""

    versions: list[bytes]
    lost: bool = False
    """A failed sync may have dropped what was written; later ones do not bring it."""


@dataclass(slots=True)
class Disk:
    """Everything a disk may hold at this moment. `view` is what reading returns while the power is on."""

    view: dict[int, bytes] = field(default_factory=dict)
    view_size: int = 0
    certain: dict[int, bytes] = field(default_factory=dict)
    uncertain: dict[int, Uncertain] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [0])
    names: list[bool] = field(default_factory=lambda: [False])
    begun: list[int] = field(default_factory=list)
    """Commits asked for after the last acknowledged one."""
    acknowledged: int | None = None

    @classmethod
    def of(cls, image: Image) -> Disk:
        """A disk that is switched on again."""
        return cls(dict(image.sectors), image.size, dict(image.sectors), {}, [image.size], [image.named])

    def apply(self, event: Event) -> None:
        match event:
            case Write(offset, data):
                self._write(offset, data)
            case Sync(succeeds):
                self._sync(succeeds)
            case Rename(durable):
                self.names = [True] if durable else [False, True]
            case Begin(number):
                self.begun.append(number)
            case Acknowledge(number):
                self.acknowledged = number
                self.begun.clear()

    def _write(self, offset: int, data: bytes) -> None:
        position = 0
        while position < len(data):
            number, within = divmod(offset + position, SECTOR)
            piece = data[position : position + SECTOR - within]
            old = self.view.get(number, NOTHING)
            new = old[:within] + piece + old[within + len(piece) :]
            self.view[number] = new
            known = self.uncertain.setdefault(number, Uncertain([self.certain.get(number, NOTHING)]))
            known.versions.append(new)
            known.lost = False
            position += len(piece)
        if offset + len(data) > self.view_size:
            self.view_size = offset + len(data)
            self.sizes.append(self.view_size)

    def _sync(self, succeeds: bool) -> None:
        if not succeeds:
            for known in self.uncertain.values():
                known.lost = True
            return
        for number in [number for number, known in self.uncertain.items() if not known.lost]:
            self.certain[number] = self.uncertain.pop(number).versions[-1]
        self.sizes = [self.view_size]

    def read(self, size: int, offset: int) -> bytes:
        return Image(self.view, self.view_size, True).read(size, offset)

    # -- crashes

    def options(self, cuts: tuple[int, ...]) -> tuple[list[int], list[list[bytes]]]:
        """The sectors in doubt, and what each may hold; a sector on its way may be torn at any of `cuts` (bytes)."""
        numbers, options = [], []
        for number, known in self.uncertain.items():
            held = list(dict.fromkeys(known.versions))
            torn = [new[:cut] + old[cut:] for old, new in itertools.pairwise(known.versions) for cut in cuts]
            choices = list(dict.fromkeys(held + torn))
            if len(choices) > 1:
                numbers.append(number)
                options.append(choices)
        return numbers, options

    def crashes(self, cuts: tuple[int, ...], limit: int) -> Iterator[Image]:
        """Every image the disk may be left with. Fails when there are more than `limit`: no silent sampling."""
        numbers, options = self.options(cuts)
        sizes, names = list(dict.fromkeys(self.sizes)), list(dict.fromkeys(self.names))
        count = math.prod(map(len, options)) * len(sizes) * len(names)
        assert count <= limit, f"{count} images of one crash; use `crash` to sample"
        for size, named in itertools.product(sizes, names):
            for chosen in itertools.product(*options):
                yield self._image(numbers, chosen, size, named)

    def crash(self, chance: random.Random) -> Image:
        """One image the disk may be left with; all-old, all-new and mixtures are about equally likely."""
        numbers, options = self.options((chance.randrange(1, SECTOR),))
        share = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        chosen = [choices[0] if chance.random() < share else chance.choice(choices) for choices in options]
        return self._image(numbers, chosen, chance.choice(self.sizes), chance.choice(self.names))

    def crash_whole(self, chance: random.Random) -> Image:
        """As `crash`, but no sector is torn in itself."""
        numbers, options = self.options(())
        chosen = [chance.choice(choices) for choices in options]
        return self._image(numbers, chosen, chance.choice(self.sizes), chance.choice(self.names))

    def _image(self, numbers: list[int], chosen: Sequence[bytes], size: int, named: bool) -> Image:
        sectors = self.certain | dict(zip(numbers, chosen, strict=True))
        # Where there is one choice only, the sector is not in `numbers` and holds what `certain` says or the same.
        return Image({number: data for number, data in sectors.items() if number * SECTOR < size}, size, named)


@dataclass(slots=True)
class Fault:
    """The `after`-th call of `call` from now on fails with `number` (errno); a write is then done in part."""

    call: str
    number: int = errno.EIO
    after: int = 1


class RecordingFile:
    """A `BlockFile` on a `Disk`; `history` is everything that happened.

    With `whole_sectors` a write that fails has written whole sectors, and a sync that fails has brought whole sectors;
    without it any part.
    """

    def __init__(
        self, disk: Disk | None = None, chance: random.Random | None = None, *, whole_sectors: bool = False
    ) -> None:
        self.disk = disk or Disk()
        self.history: list[Event] = []
        self.fault: Fault | None = None
        self.chance = chance or random.Random(0)
        self.whole_sectors = whole_sectors

    def note(self, event: Event) -> None:
        """Record, and let it happen."""
        self.history.append(event)
        self.disk.apply(event)

    @property
    def published(self) -> bool:
        return self.disk.names == [True]

    def pread(self, size: int, offset: int) -> bytes:
        self._fail_if_due("pread")
        return self.disk.read(size, offset)

    def pwrite(self, data: bytes, offset: int) -> None:
        try:
            self._fail_if_due("pwrite")
        except OSError:
            self.note(Write(offset, data[: self._part(len(data))]))
            raise
        self.note(Write(offset, data))

    def pwritev(self, pieces: Sequence[bytes | memoryview], size: int, offset: int) -> None:
        assert size == sum(map(len, pieces))
        self.pwrite(b"".join(pieces), offset)

    def fdatasync(self) -> None:
        try:
            self._fail_if_due("fdatasync")
        except OSError:
            self.note(Sync(succeeds=False))
            raise
        self.note(Sync(succeeds=True))

    def settle(self) -> None:
        """Sync, and read again what a failed sync may have dropped: whatever the disk then says, it will say again."""
        self.fdatasync()
        image = (self.disk.crash_whole if self.whole_sectors else self.disk.crash)(self.chance)
        begun, acknowledged = self.disk.begun, self.disk.acknowledged
        self.disk = Disk.of(image)
        self.disk.begun, self.disk.acknowledged = begun, acknowledged

    def check_place(self) -> None:
        """Nobody else is here."""

    def lock(self) -> None:
        """Nobody else is here."""

    def unlock(self) -> None:
        """Nobody else is here."""

    @property
    def lock_descriptor(self) -> int | None:
        """Nor a lock to pass on."""
        return None

    def publish(self) -> None:
        if True not in self.disk.names:
            self._fail_if_due("rename")
            self.note(Rename(durable=False))
        self._fail_if_due("sync_directory")
        self.note(Rename(durable=True))

    def close(self) -> None:
        """Nothing to release."""

    def _part(self, size: int) -> int:
        part = self.chance.randrange(size + 1)
        return part // SECTOR * SECTOR if self.whole_sectors else part

    def _fail_if_due(self, call: str) -> None:
        if self.fault is None or self.fault.call != call:
            return
        self.fault.after -= 1
        if self.fault.after == 0:
            number, self.fault = self.fault.number, None
            raise OSError(number, os.strerror(number))


def replay(history: list[Event]) -> Iterator[Disk]:
    """The disk before the first event and after every event: every prefix."""
    disk = Disk()
    yield deepcopy(disk)
    for event in history:
        disk.apply(event)
        yield deepcopy(disk)
