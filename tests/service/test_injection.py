"""What a client sees of a TPM that fails on purpose."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.faults import FaultPlan, parse_faults
from crbd.service.injection import FaultyEngine, FaultyStore, StartedEngine
from crbd.service.instance import Instance
from crbd.service.options import CheckpointPolicy, InstanceOptions, Startup
from crbd.store.memory import MemoryStore
from tests.engine import commands as c
from tests.engine.conftest import MemoryStatePort

RETRY, LOCKOUT, NV_DEFINED, INSUFFICIENT = 0x922, 0x921, 0x14C, 0x9A
GET_TEST_RESULT, GET_CAPABILITY = c.command(0x17C), c.command(0x17A, bytes.fromhex("000000060000010000000001"))
DIGEST = bytes(range(32))
ZERO = bytes(32)
NEVER = CheckpointPolicy()
Make = Callable[[StatePort], Engine]


class Failing:
    """An instance with a TPM that fails on purpose, and the engines behind it."""

    def __init__(self, faults: str, make: Make, kind: type[FaultyEngine], options: InstanceOptions) -> None:
        self.plan = FaultPlan()
        self.engines: list[Engine] = []
        self.store = MemoryStore()

        def make_engine(port: StatePort) -> Engine:
            self.engines.append(make(port))
            return kind(self.engines[-1], port, self.plan)

        self.instance = Instance(make_engine, FaultyStore(self.store, self.plan), options)
        self.instance.check()
        self.instance.begin()
        self.plan.replace(parse_faults(faults, "test"))

    def run(self, *commands: bytes) -> list[int]:
        return [c.code(self.instance.execute(command)) for command in commands]

    def pcr(self, number: int) -> bytes:
        return c.pcr_value(self.instance.execute(c.pcr_read(number)))


@contextmanager
def failing(
    faults: str,
    make: Make = FakeEngine,
    *,
    kind: type[FaultyEngine] = FaultyEngine,
    startup: Startup = Startup.CLEAR,
    checkpoint: CheckpointPolicy = NEVER,
) -> Iterator[Failing]:
    options = InstanceOptions(startup=startup, may_manufacture=True, checkpoint=checkpoint)
    tpm = Failing(faults, make, kind, options)
    try:
        yield tpm
    finally:
        tpm.plan.replace(())
        tpm.instance.close()


def test_the_nth_is_answered_and_not_run() -> None:
    with failing("PCR_Extend:2=retry") as tpm:
        extend = c.pcr_extend(16, DIGEST)
        assert tpm.run(extend) == [c.SUCCESS]
        once = tpm.pcr(16)
        assert tpm.run(extend) == [RETRY]
        assert tpm.pcr(16) == once
        assert tpm.run(extend) == [c.SUCCESS]
        assert tpm.pcr(16) != once
        assert tpm.plan.struck == 1


def test_a_delay_is_ended_by_cancel() -> None:
    with failing("GetRandom:1=delay:3600s;GetRandom:2=delay:1ms") as tpm:
        answers: list[int] = []
        client = threading.Thread(target=lambda: answers.extend(tpm.run(c.GET_RANDOM)))
        client.start()
        # As a control client that cancels until there is an answer: a cancel before the command counts for nothing.
        while client.is_alive():
            tpm.instance.cancel()
            client.join(0.01)
        assert answers == [c.CANCELED]
        assert tpm.run(c.GET_RANDOM) == [c.SUCCESS]


def test_failure_mode_lasts_until_a_reset() -> None:
    with failing("GetRandom:1=failure-mode", LibtpmsEngine) as tpm:
        assert tpm.run(c.pcr_extend(16, DIGEST), c.GET_RANDOM) == [c.SUCCESS, c.FAILURE]
        tpm.plan.replace(())
        assert tpm.run(c.pcr_extend(16, DIGEST), c.GET_RANDOM, c.SHUTDOWN_CLEAR) == [c.FAILURE] * 3
        assert tpm.run(GET_TEST_RESULT, GET_CAPABILITY) == [c.SUCCESS] * 2
        tpm.instance.init(delete_volatile=False)
        assert tpm.run(c.STARTUP_CLEAR, c.GET_RANDOM) == [c.SUCCESS] * 2


@pytest.mark.parametrize("make", [FakeEngine, LibtpmsEngine])
def test_a_reset_is_one_of_the_tpm_under_its_client(make: Make) -> None:
    with failing("GetRandom:2=reset;GetRandom:3=power-cut", make) as tpm:
        assert tpm.run(c.nv_define(8), c.pcr_extend(16, DIGEST), c.GET_RANDOM) == [c.SUCCESS] * 3
        assert tpm.pcr(16) != ZERO
        assert tpm.run(c.GET_RANDOM) == [c.SUCCESS], "firmware has started it"
        assert tpm.pcr(16) == ZERO
        assert tpm.run(c.nv_define(8)) == [NV_DEFINED], "what was stored is there"
        assert tpm.run(c.GET_RANDOM, c.STARTUP_CLEAR, c.GET_RANDOM) == [c.INITIALIZE, c.SUCCESS, c.SUCCESS]


def test_a_reset_does_not_go_on_from_a_checkpoint() -> None:
    with failing("GetRandom:1=reset", LibtpmsEngine, checkpoint=CheckpointPolicy(every_command=True)) as tpm:
        assert tpm.run(c.pcr_extend(16, DIGEST)) == [c.SUCCESS]
        assert tpm.run(c.GET_RANDOM) == [c.SUCCESS]
        assert tpm.pcr(16) == ZERO


def test_a_write_that_fails_is_made_up_for() -> None:
    with failing("store:1-2=enospc") as tpm:
        stored = tpm.store.estate().held
        assert tpm.run(c.nv_define(8)) == [c.FAILURE]
        assert tpm.run(c.GET_RANDOM) == [c.FAILURE], "nothing runs while the disk lacks what memory has"
        assert tpm.store.estate().held == stored
        assert tpm.run(c.nv_define(8)) == [NV_DEFINED], "it was done, and stored before this was run"
        assert tpm.store.estate().held != stored


@pytest.mark.parametrize("make", [FakeEngine, LibtpmsEngine])
def test_a_started_engine_needs_no_firmware(make: Make) -> None:
    with failing("GetRandom:3=power-cut", make, kind=StartedEngine, startup=Startup.POWER_ON) as tpm:
        assert tpm.run(c.GET_RANDOM) == [c.SUCCESS]
        assert tpm.run(c.pcr_extend(16, DIGEST)) == [c.SUCCESS]
        tpm.instance.init(delete_volatile=False)
        assert tpm.run(c.GET_RANDOM) == [c.SUCCESS]
        assert tpm.pcr(16) == ZERO
        assert tpm.run(c.GET_RANDOM) == [c.INITIALIZE], "power came back without it"


def test_what_is_no_command_is_the_tpms_own_business() -> None:
    port = MemoryStatePort()
    engine = FaultyEngine(FakeEngine(port), port, FaultPlan(parse_faults("*=lockout", "test")))
    engine.start()
    assert c.code(engine.execute(c.STARTUP_CLEAR)) == c.SUCCESS
    assert [c.code(engine.execute(piece)) for piece in (b"", c.GET_RANDOM[:9])] == [INSUFFICIENT, c.COMMAND_SIZE]
    assert c.code(engine.execute(c.GET_RANDOM)) == LOCKOUT
