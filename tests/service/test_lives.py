"""Whole lives of a TPM, of steps in any order, on a disk that fails in the middle of any of them: what was acknowledged
is there afterwards, and no new TPM is ever made in the place of one that was.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crbd.engine.fake import FakeEngine
from crbd.errors import CrbdError
from crbd.service.frozen import document_of, frozen_of
from crbd.service.instance import Instance
from crbd.service.options import CheckpointPolicy, InstanceOptions
from crbd.state.handover import Handover, decode, encode
from crbd.state.kinds import StateKind
from crbd.store.layout import Layout
from tests.engine import commands as c

from .storage import directory, opened

OPTIONS = InstanceOptions(may_manufacture=True, release_lock_outgoing=True, lock_retries=0)
POLICIES = [CheckpointPolicy(), CheckpointPolicy(every_command=True), CheckpointPolicy(when_idle=60.0)]
CALLS = ("write", "pwrite", "pwritev", "fsync", "fdatasync", "replace", "rename", "link", "unlink")
SIZE = 8


class Disk:
    """Between this process and the system: from the `left`-th call on nothing works any more, until `heal`."""

    def __init__(self) -> None:
        self.left: int | None = None
        self._real: dict[str, Callable[..., object]] = {name: getattr(os, name) for name in CALLS}

    def heal(self) -> None:
        self.left = None

    @contextmanager
    def in_the_way(self) -> Iterator[Disk]:
        with pytest.MonkeyPatch.context() as patches:
            for name in CALLS:
                patches.setattr(os, name, self._breaking(name))
            yield self

    def _breaking(self, name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            if self.left == 0:
                raise OSError(errno.EIO, "Input/output error")
            if self.left is not None:
                self.left -= 1
            return self._real[name](*arguments)

        return call


class World:
    """One TPM, the process that has it, and what may be in its NV index if that process dies now."""

    def __init__(self, path: Path, layout: Layout, policy: CheckpointPolicy, disk: Disk) -> None:
        self.path, self.layout, self.disk = path, layout, disk
        self.options = replace(OPTIONS, checkpoint=policy if layout is Layout.CRBD else CheckpointPolicy())
        self.number = 0
        self.snapshot: tuple[bytes, bytes] | None = None
        self.boot()
        self.init()
        assert self.code(c.nv_define(SIZE)) == c.SUCCESS
        assert self.code(c.nv_write(self.value(0))) == c.SUCCESS
        self.possible = {self.value(0)}

    def boot(self) -> None:
        self.store = opened(self.path, self.layout)
        self.instance = Instance(FakeEngine, self.store, self.options)
        self.instance.check()
        self.commits_when_in_doubt = -1
        self.same_power = True
        """No power-on since the last doubt: what was in doubt is stored before the next command is answered."""

    @staticmethod
    def value(number: int) -> bytes:
        return b"%08d" % number

    def code(self, command: bytes) -> int:
        return c.code(self.instance.execute(command))

    def attempt(self, step: Callable[[], object]) -> bool:
        """Whether it was done; on a disk that works nothing is in the way."""
        works = self.disk.left is None
        try:
            step()
        except CrbdError:
            assert not works or not self.instance.running or self.instance._state.pending or not self.store.locked
            return False
        return True

    def doubt(self, value: bytes) -> None:
        self.possible.add(value)
        self.commits_when_in_doubt = self.instance._state.commits
        self.same_power = True

    # -- the steps

    def init(self) -> None:
        self.same_power = False
        if self.attempt(lambda: self.instance.init(delete_volatile=False)):
            assert self.code(c.STARTUP_CLEAR) in (c.SUCCESS, c.INITIALIZE, c.FAILURE)

    def stop(self) -> None:
        self.instance.stop()

    def write(self) -> None:
        self.number += 1
        value = self.value(self.number)
        if self.code(c.nv_write(value)) == c.SUCCESS:
            self.possible = {value}
        else:
            self.doubt(value)

    def read(self) -> None:
        answer = self.instance.execute(c.nv_read(SIZE))
        assert c.code(answer) in (c.SUCCESS, c.FAILURE, c.INITIALIZE), "there is the index, whatever else is"
        if c.code(answer) == c.SUCCESS:
            assert c.nv_value(answer) in self.possible
            if self.same_power or self.instance._state.commits > self.commits_when_in_doubt:
                self.possible = {c.nv_value(answer)}

    def store_volatile(self) -> None:
        if self.instance.running:
            self.attempt(self.instance.store_volatile)

    def rest(self) -> None:
        self.instance.checkpoint_when_idle()
        self.instance.checkpoint_when_idle()

    def blobs(self) -> None:
        """A state that no engine takes, for the next INIT."""
        if not self.instance.running:
            with pytest.raises(CrbdError):
                self.instance.set_state_blob(StateKind.PERMANENT, b"hostile")

    def give_up(self) -> None:
        """The lock, and nobody takes it: whatever comes next takes it back."""
        self.attempt(lambda: self.instance.state_blob(StateKind.SAVESTATE))

    def lock(self) -> None:
        self.attempt(lambda: self.instance.lock_storage(0))

    def take_snapshot(self) -> None:
        answer = self.instance.execute(c.nv_read(SIZE))
        if c.code(answer) == c.SUCCESS and self.store.locked:
            taken: list[bytes] = []
            if self.attempt(lambda: taken.append(self.instance.snapshot())):
                self.snapshot = taken[0], c.nv_value(answer)

    def restore(self) -> None:
        if self.snapshot is None:
            return
        data, value = self.snapshot
        if self.attempt(lambda: self.instance.restore(data, allow_rollback=True)):
            self.possible = {value}
        else:
            self.doubt(value)

    def upgrade(self) -> None:
        """As crbd.server.daemon does it: with the handover's bytes in between."""
        try:
            frozen = self.instance.freeze()
        except CrbdError:
            return
        handover = Handover(
            1, 0, "test", document_of(frozen, "test"), frozen.facts, frozen.changed, changed_side=frozen.side
        )
        passed = encode(handover)
        self.die()
        commits = self.instance._state.commits
        self.store = opened(self.path, self.layout)
        self.instance = Instance(FakeEngine, self.store, self.options)
        self.instance.thaw(frozen_of(decode(passed, {})), "the test")
        if self.commits_when_in_doubt == commits:
            self.commits_when_in_doubt = self.instance._state.commits
        self.read()

    def die(self) -> None:
        """As by SIGKILL."""
        self.disk.heal()
        self.instance._engine.close()
        self.store.close()

    def kill(self) -> None:
        self.die()
        self.boot()
        assert not self.instance._may_manufacture
        self.init()
        assert self.instance.running
        self.read()

    def heal(self) -> None:
        """A disk that works again is enough for the TPM to."""
        self.disk.heal()
        if self.instance.running:
            assert self.code(c.nv_read(SIZE)) in (c.SUCCESS, c.INITIALIZE)
            self.read()


NAMES = ["init", "stop", "write", "read", "store_volatile", "rest", "blobs", "give_up", "lock", "take_snapshot"]
NAMES += ["restore", "upgrade", "kill"]
STEPS: dict[str, Callable[[World], None]] = {name: getattr(World, name) for name in NAMES}
OFTEN = ["write", "write", "take_snapshot", "restore", "restore", "upgrade", "kill"]
Fault = st.one_of(st.none(), st.integers(0, 8))
"""After how many calls the disk fails in this step."""


@settings(max_examples=250)
@given(
    st.sampled_from(list(Layout)),
    st.sampled_from(POLICIES),
    st.lists(st.tuples(st.sampled_from([*NAMES, *OFTEN]), Fault, st.booleans()), min_size=4, max_size=14),
)
def test_lives(layout: Layout, policy: CheckpointPolicy, steps: list[tuple[str, int | None, bool]]) -> None:
    """Each step, the fault in it, and whether the disk works again after it."""
    disk = Disk()
    with directory() as path, disk.in_the_way():
        world = World(path, layout, policy, disk)
        for step, fault, heals in steps:
            disk.left = fault if disk.left is None else disk.left
            STEPS[step](world)
            if heals:
                world.heal()
        world.kill()
        world.die()
