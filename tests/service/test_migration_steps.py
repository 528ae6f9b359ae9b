"""A migration that fails at any step leaves exactly one side able to run the TPM, and it is the right one.

Two instances with the fake TPM on real stores, and a VMM that does what QEMU and libvirt do: it fetches the blobs, sets
them, powers the destination on, lets the guest go on there, and ends the source. At one of these steps something fails.
Then the VMM ends the side that failed and has the guest go on at the other: at the destination if the TPM there was
powered on and the source is gone or the guest has already moved, else at the source. If neither is left, the TPM is
started anew from the storage, with all that was durable.

The guest's commands are counted by a PCR (volatile) and an NV index (permanent); both must be what it made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from crbd.engine.fake import FakeEngine
from crbd.errors import CrbdError
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from crbd.store.layout import Layout
from crbd.tpm.head import response_code
from tests.engine import commands as c

from .storage import directory, full_disk, opened

PCR = 16


class Process:
    """A daemon: it ends in good order (`end`) or is killed; then the kernel gives its lock back and nobody writes."""

    def __init__(self, path: Path, layout: Layout, options: InstanceOptions) -> None:
        self.store = opened(path, layout, incoming=options.incoming)
        self.instance = Instance(FakeEngine, self.store, options)
        self.instance.check()
        self.alive = True

    def end(self) -> None:
        if self.alive:
            self.instance.close()
        self.alive = False

    def kill(self) -> None:
        self.store.close()
        self.alive = False

    def runs(self, command: bytes) -> bool:
        return self.alive and response_code(self.instance.execute(command)) == c.SUCCESS


@dataclass(slots=True)
class Guest:
    """What the guest did, and what its TPM must therefore hold."""

    pcr: bytes = bytes(32)
    count: int = 0

    def works_on(self, process: Process) -> bool:
        """Whether its commands are carried out there."""
        digest = self.count.to_bytes(32, "big")
        if not process.runs(c.pcr_extend(PCR, digest)):
            return False
        self.pcr = hashlib.sha256(self.pcr + digest).digest()
        self.count += 1
        return process.runs(c.nv_write(self.count.to_bytes(8, "big")))

    def recognises(self, process: Process) -> None:
        """Its TPM is as it left it."""
        assert c.pcr_value(process.instance.execute(c.pcr_read(PCR))) == self.pcr
        assert c.nv_value(process.instance.execute(c.nv_read(8))) == self.count.to_bytes(8, "big")


class Step(Enum):
    """In this order."""

    GET_PERMANENT = "GET_STATEBLOB permanent"
    GET_VOLATILE = "GET_STATEBLOB volatile"
    GET_SAVESTATE = "GET_STATEBLOB savestate"
    SET_PERMANENT = "SET_STATEBLOB permanent"
    SET_VOLATILE = "SET_STATEBLOB volatile"
    INIT = "INIT"
    GUEST = "the guest goes on at the destination"
    STOP = "the source is ended"


class Failure(Enum):
    """What happens, just before a step or instead of it."""

    CANCELLED = "the VMM gives up, and ends the destination in good order"
    SOURCE_KILLED = "the source is killed"
    DESTINATION_KILLED = "the destination is killed"
    GARBLED = "the blob of a SET_STATEBLOB arrives cut short"
    DISK_FULL = "the destination's disk is full at INIT"


@dataclass(slots=True)
class Migration:
    """Two processes and what is under way between them."""

    source: Process
    destination: Process
    guest: Guest
    blobs: dict[StateKind, bytes] = field(default_factory=dict)
    powered: bool = False
    """The TPM is on at the destination."""
    moved: bool = False
    """The guest ran there."""

    def do(self, step: Step, failure: Failure | None) -> None:
        """Raises CrbdError where a side refuses."""
        cut = 5 if failure is Failure.GARBLED else 0
        match step:
            case Step.GET_PERMANENT:
                self._get(StateKind.PERMANENT)
            case Step.GET_VOLATILE:
                self._get(StateKind.VOLATILE)
            case Step.GET_SAVESTATE:
                self._get(StateKind.SAVESTATE)
            case Step.SET_PERMANENT:
                self._set(StateKind.PERMANENT, cut)
            case Step.SET_VOLATILE:
                self._set(StateKind.VOLATILE, cut)
            case Step.INIT:
                with full_disk() if failure is Failure.DISK_FULL else nullcontext():
                    self.destination.instance.init(delete_volatile=True)
                self.powered = True
            case Step.GUEST:
                assert self.guest.works_on(self.destination)
                self.moved = True
            case Step.STOP:
                self.source.end()

    def _get(self, kind: StateKind) -> None:
        blob = self.source.instance.state_blob(kind)
        if blob is not None:
            self.blobs[kind] = blob

    def _set(self, kind: StateKind, cut: int) -> None:
        blob = self.blobs[kind]
        self.destination.instance.set_state_blob(kind, blob[: len(blob) - cut])

    def run(self, fails_at: Step | None, failure: Failure) -> None:
        """As far as it goes."""
        for step in Step:
            if step is fails_at:
                match failure:
                    case Failure.CANCELLED:
                        return
                    case Failure.SOURCE_KILLED:
                        self.source.kill()
                        # What was sent arrives; what was not fetched cannot be.
                        if step in (Step.GET_PERMANENT, Step.GET_VOLATILE, Step.GET_SAVESTATE):
                            return
                    case Failure.DESTINATION_KILLED:
                        self.destination.kill()
                        return
                    case Failure.GARBLED | Failure.DISK_FULL:
                        pass
            try:
                self.do(step, failure if step is fails_at else None)
            except CrbdError:
                return

    def settle(self) -> tuple[Process | None, Process]:
        """The VMM decides where the guest goes on: the side that must be able to, and one that must not."""
        if self.destination.alive and self.powered and (self.moved or not self.source.alive):
            self.moved = True
            return self.destination, self.source
        self.destination.end()
        if self.source.alive and not self.moved:
            return self.source, self.destination
        return None, self.source


def migration(path: Path, layout: Layout, shared: bool, before: int) -> Migration:
    """A guest that has worked a little, and a destination that waits."""
    there = path / "there"
    here = path / "here"
    for place in (here, there):
        place.mkdir()
    outgoing = InstanceOptions(may_manufacture=True, release_lock_outgoing=shared, lock_retries=0)
    source = Process(here, layout, outgoing)
    source.instance.init(delete_volatile=False)
    assert source.runs(c.STARTUP_CLEAR)
    assert source.runs(c.nv_define(8))
    guest = Guest()
    for _ in range(before):
        assert guest.works_on(source)
    incoming = InstanceOptions(incoming=True, release_lock_outgoing=shared, lock_retries=0)
    return Migration(source, Process(here if shared else there, layout, incoming), guest)


_ATTEMPTS: tuple[Callable[[Instance], object], ...] = (
    lambda _: None,
    lambda one: one.lock_storage(1),
    lambda one: one.store_volatile(),
    lambda one: one.state_blob(StateKind.PERMANENT),
    lambda one: one.hash_start(),
)


def is_shut_out(process: Process, attempts: tuple[Callable[[Instance], object], ...]) -> None:
    """However it tries, no command is carried out there."""
    for attempt in attempts:
        with suppress(CrbdError):
            attempt(process.instance)
        assert not process.runs(c.pcr_read(PCR))


@settings(max_examples=150)
@given(
    st.sampled_from(Layout),
    st.booleans(),
    st.integers(1, 3),
    st.one_of(st.none(), st.sampled_from(Step)),
    st.sampled_from(Failure),
)
def test_exactly_one_side_can_run_the_tpm_and_it_is_the_right_one(
    layout: Layout, shared: bool, before: int, fails_at: Step | None, failure: Failure
) -> None:
    with directory() as path:
        under_way = migration(path, layout, shared, before)
        under_way.run(fails_at, failure)
        right, wrong = under_way.settle()
        guest = under_way.guest
        if right is None:
            if shared and wrong.alive:
                # The guest worked at the destination: what the source remembers is no longer the TPM.
                is_shut_out(wrong, _ATTEMPTS)
            _ends(under_way, path, layout, shared)
            return
        guest.recognises(right)
        assert guest.works_on(right)
        guest.recognises(right)
        if shared and wrong.alive:
            is_shut_out(wrong, (*_ATTEMPTS, lambda one: one.init(delete_volatile=False)))
            guest.recognises(right)
        _ends(under_way, path, layout, shared)


def _ends(under_way: Migration, path: Path, layout: Layout, shared: bool) -> None:
    """Whoever is left is ended; a new start finds all that the guest was told to be durable."""
    for process in (under_way.source, under_way.destination):
        process.end()
    where = path / ("there" if under_way.moved and not shared else "here")
    again = Process(where, layout, InstanceOptions())
    again.instance.init(delete_volatile=False)
    assert again.runs(c.STARTUP_CLEAR)
    assert c.nv_value(again.instance.execute(c.nv_read(8))) == under_way.guest.count.to_bytes(8, "big")
    again.end()
