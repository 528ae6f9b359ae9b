"""Freeze and thaw of a whole instance: a run that is frozen between any two steps is the run that never was."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE
from crbd.engine.libtpms import LibtpmsEngine
from crbd.errors import EngineError, StateDamagedError, StoreError
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.state.kinds import StateKind
from tests.engine import commands as c

from .failing_store import FailingStore
from .instances import CREATE, Bench

CLOCK_AND_COUNTS = c.command(0x17A, struct.pack(">III", 6, 0x204, 1))
"""TPM2_GetCapability of TPM_PT_NV_COUNTERS_AVAIL: as good a property as any that must not change."""
PERSISTENT = c.command(0x17A, struct.pack(">III", 1, 0x81000000, 16))
TRANSIENT = c.command(0x17A, struct.pack(">III", 1, 0x80000000, 16))
SESSIONS = c.command(0x17A, struct.pack(">III", 1, 0x02000000, 16))
PCR_SESSION = c.command(0x176, struct.pack(">II", 0x40000007, 0x40000007) + c.sized(bytes(16)) + c.sized(b"")
                        + b"\x01\x00\x10\x00\x0b")  # fmt: skip
ECC_STORAGE = bytes.fromhex("0023000b00030472000000060080004300100003001000000000")


class Run:
    """Steps on an instance, each of which says what a client sees."""

    def __init__(self) -> None:
        self.store = FailingStore()
        self.instance = Instance(LibtpmsEngine, self.store, CREATE)

    def freeze(self) -> None:
        """Freeze, drop the process, thaw in another one on the same store, which has no permission to make a TPM."""
        frozen = self.instance.freeze()
        pages = self.instance.register_pages()
        self.instance._engine.close()  # as a process that is gone: no TPM2_Shutdown, nothing stored
        self.instance = Instance(LibtpmsEngine, self.store, InstanceOptions())
        self.instance.thaw(frozen, "the test")
        assert self.instance.register_pages() == pages

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.instance._engine.close()


Step = Callable[[Instance], object]


def attempt(call: Callable[[], object]) -> object:
    """What a call gives, or which result it raises."""
    try:
        return call()
    except EngineError as error:
        return error.result


def executing(command: bytes, *, part: slice = slice(None)) -> Step:
    return lambda instance: instance.execute(command)[part]


def registers(instance: Instance) -> list[bytes]:
    """The pages without their data buffer, in which there may be what the TPM drew at random."""
    pages = instance.register_pages()
    return [pages[at : at + BUFFER_OFFSET] for at in range(0, len(pages), PAGE_SIZE)]


STEPS: dict[str, Step] = {
    "init": lambda instance: attempt(lambda: instance.init(delete_volatile=False)),
    "startup": executing(c.STARTUP_CLEAR),
    "extend 16": executing(c.pcr_extend(16, b"\x16" * 32)),
    "extend 7": executing(c.pcr_extend(7, b"\x07" * 32)),
    "extend 17, which locality 0 may not": executing(c.pcr_extend(17, b"\x17" * 32)),
    "read 17": executing(c.pcr_read(17)),
    "read 16": executing(c.pcr_read(16)),
    "read 7": executing(c.pcr_read(7)),
    "nv define": executing(c.nv_define(8)),
    "nv write": executing(c.nv_write(b"12345678")),
    "nv read": executing(c.nv_read(8)),
    "primary": executing(c.create_primary(ECC_STORAGE), part=slice(0, 14)),
    "session": executing(PCR_SESSION, part=slice(0, 14)),
    "transient objects": executing(TRANSIENT),
    "sessions": executing(SESSIONS),
    "persistent objects": executing(PERSISTENT),
    "counters": executing(CLOCK_AND_COUNTS),
    "locality 2": lambda instance: instance.set_locality(2),
    "locality 0": lambda instance: instance.set_locality(0),
    "hash start": lambda instance: attempt(instance.hash_start),
    "hash data": lambda instance: attempt(lambda: instance.hash_data(b"measured")),
    "hash end": lambda instance: attempt(instance.hash_end),
    "established": lambda instance: attempt(instance.established),
    "reset established": lambda instance: attempt(lambda: instance.reset_established(3)),
    "registers": registers,
    "shutdown": executing(c.SHUTDOWN_STATE),
    "stop": lambda instance: instance.stop(),
    "small buffer": lambda instance: attempt(lambda: instance.buffer_size(3072)),
    "buffer": lambda instance: instance.buffer_size(0),
    "no command": executing(bytes.fromhex("00c10000000a00000054")),
}
ORDINARY = ["init", "startup", "extend 16", "nv define", "nv write", "session", "primary", "locality 2", "hash start"]
ORDINARY += ["hash data", "hash data", "hash end", "established", "read 17", "extend 17, which locality 0 may not"]
ORDINARY += ["read 17", "sessions", "transient objects", "registers", "nv read", "read 16", "reset established"]
ORDINARY += ["hash start", "stop", "registers"]
ORDINARY += ["init", "established", "init", "startup", "read 16", "nv read", "registers", "shutdown", "stop", "read 16"]
ORDINARY += ["small buffer", "buffer", "init", "startup", "nv read", "persistent objects", "counters"]


def observed(steps: list[str], frozen_after: set[int]) -> list[object]:
    """What a client sees of the steps, with a freeze and a thaw after those of these numbers."""
    seen: list[object] = []
    with Run() as run:
        for number, step in enumerate(steps):
            seen.append(STEPS[step](run.instance))
            if number in frozen_after:
                run.freeze()
    return seen


def test_the_ordinary_life_shows_what_it_should() -> None:
    """The steps themselves do something: otherwise comparing them would prove nothing."""
    seen = list(zip(ORDINARY, observed(ORDINARY, set()), strict=True))
    for step in ("extend 16", "nv define", "nv write", "session", "primary", "nv read"):
        answer = next(answer for name, answer in seen if name == step)
        assert isinstance(answer, bytes)
        assert int.from_bytes(answer[6:10], "big") == c.SUCCESS, step
    assert [answer for name, answer in seen if name == "established"] == [True, True]


def test_frozen_after_every_step() -> None:
    assert observed(ORDINARY, set(range(len(ORDINARY)))) == observed(ORDINARY, set())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(STEPS)), max_size=14), st.data())
def test_frozen_anywhere_in_anything(steps: list[str], data: st.DataObject) -> None:
    steps = ["init", "startup", *steps]
    frozen_after = data.draw(st.sets(st.integers(0, len(steps) - 1)))
    assert observed(steps, frozen_after) == observed(steps, set())


def test_what_is_durable_already_is_not_written_again() -> None:
    with Run() as run:
        for step in ("init", "startup", "nv define", "nv write"):
            STEPS[step](run.instance)
        commits = run.store.commits
        run.freeze()
        STEPS["read 16"](run.instance)
        assert run.store.commits == commits


def test_a_change_that_was_not_durable_yet_goes_along() -> None:
    with Run() as run:
        for step in ("init", "startup", "nv define"):
            STEPS[step](run.instance)
        run.store.full = True
        assert c.code(run.instance.execute(c.nv_write(b"12345678"))) == c.FAILURE
        run.freeze()
        assert c.code(run.instance.execute(c.nv_read(8))) == c.FAILURE
        run.store.full = False
        assert c.nv_value(run.instance.execute(c.nv_read(8))) == b"12345678"
        assert b"12345678" in (run.store.load(StateKind.PERMANENT) or b"")


def test_blobs_handed_in_go_along() -> None:
    with Run() as source:
        for step in ("init", "startup", "extend 16"):
            STEPS[step](source.instance)
        expected = STEPS["read 16"](source.instance)
        blobs = {kind: source.instance.state_blob(kind) for kind in (StateKind.PERMANENT, StateKind.VOLATILE)}
    with Run() as target:
        for kind, blob in blobs.items():
            target.instance.set_state_blob(kind, blob or b"")
            target.freeze()
        target.instance.init(delete_volatile=False)
        assert STEPS["read 16"](target.instance) == expected


def test_state_that_the_engine_rejects_is_refused_and_nothing_written() -> None:
    bench = Bench().started()
    frozen = bench.instance.freeze()
    states = dict(frozen.states) | {StateKind.PERMANENT: b"nonsense"}
    other = Bench(InstanceOptions(), FailingStore({StateKind.PERMANENT: frozen.states[StateKind.PERMANENT]}))
    object.__setattr__(frozen, "states", states)
    with pytest.raises(StateDamagedError, match="rejects the permanent state in the test"):
        other.instance.thaw(frozen, "the test")
    assert not other.instance.running
    assert other.store.commits == 0


def test_nothing_is_frozen_while_the_lock_is_given_up() -> None:
    bench = Bench(InstanceOptions(may_manufacture=True, release_lock_outgoing=True)).started()
    for kind in StateKind:
        bench.instance.state_blob(kind)
    with pytest.raises(StoreError, match="a migration is under way"):
        bench.instance.freeze()
