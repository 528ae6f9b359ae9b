"""The fake engine's controls, on which other tests lean."""

from __future__ import annotations

import threading

import pytest

from crbd.engine.fake import Executed, FakeEngine
from crbd.errors import EngineError

from . import commands as c
from .conftest import MemoryStatePort


class ScriptedError(Exception):
    """What a script of these tests raises."""


@pytest.fixture
def fake(port: MemoryStatePort) -> FakeEngine:
    """A fake that is on, before TPM2_Startup."""
    engine = FakeEngine(port)
    engine.start()
    return engine


def test_the_log_tells_command_and_locality(fake: FakeEngine) -> None:
    fake.execute(memoryview(c.STARTUP_CLEAR))
    fake.locality = 2
    fake.execute(c.GET_RANDOM)
    assert fake.log == [Executed(c.STARTUP_CLEAR, 0), Executed(c.GET_RANDOM, 2)]


def test_the_script_comes_before_the_tpm(fake: FakeEngine) -> None:
    fake.script += [b"anything", ScriptedError()]
    assert fake.execute(c.STARTUP_CLEAR) == b"anything"
    with pytest.raises(ScriptedError):
        fake.execute(c.STARTUP_CLEAR)
    assert c.code(fake.execute(c.STARTUP_CLEAR)) == c.SUCCESS


def executing(fake: FakeEngine, command: bytes) -> tuple[threading.Thread, list[bytes]]:
    """Run a command in a thread."""
    answers: list[bytes] = []
    thread = threading.Thread(target=lambda: answers.append(fake.execute(command)))
    thread.start()
    return thread, answers


def test_the_gate_holds_a_command_until_it_opens(fake: FakeEngine) -> None:
    fake.gate.close()
    thread, answers = executing(fake, c.STARTUP_CLEAR)
    fake.gate.wait_held()
    assert fake.log == [Executed(c.STARTUP_CLEAR, 0)]
    assert answers == []
    fake.gate.open()
    thread.join(10)
    assert c.code(answers[0]) == c.SUCCESS


def test_a_held_command_is_cancelled_and_has_no_effect(fake: FakeEngine) -> None:
    fake.gate.close()
    thread, answers = executing(fake, c.STARTUP_CLEAR)
    fake.gate.wait_held()
    fake.cancel()
    thread.join(10)
    assert c.code(answers[0]) == c.CANCELED
    assert fake.cancels == 1
    fake.gate.open()
    assert c.code(fake.execute(c.STARTUP_CLEAR)) == c.SUCCESS


def test_a_cancel_before_the_command_does_not_cancel_it(fake: FakeEngine) -> None:
    fake.cancel()
    fake.gate.close()
    thread, answers = executing(fake, c.STARTUP_CLEAR)
    fake.gate.wait_held()
    fake.gate.open()
    thread.join(10)
    assert c.code(answers[0]) == c.SUCCESS


def test_waiting_for_a_command_that_never_comes_ends(fake: FakeEngine) -> None:
    fake.gate.close()
    with pytest.raises(TimeoutError):
        fake.gate.wait_held(0.01)


def test_profiles_where_it_claims_them(port: MemoryStatePort) -> None:
    engine = FakeEngine(port, profiles=True)
    assert engine.supports_profiles
    engine.set_profile('{"Name":"custom"}')
    engine.start()
    assert '"custom"' in engine.info(32)
    with pytest.raises(EngineError):
        engine.set_profile('{"Name":"custom"}')
    engine.stop()
    with pytest.raises(EngineError):
        engine.set_profile("custom")


def test_nv_is_bounded(fake: FakeEngine) -> None:
    fake.execute(c.STARTUP_CLEAR)
    assert c.code(fake.execute(c.nv_read(4))) == 0x28B
    assert c.code(fake.execute(c.nv_define(4))) == c.SUCCESS
    assert c.code(fake.execute(c.nv_define(4))) == 0x14C
    assert c.code(fake.execute(c.nv_read(4))) == 0x14A
    assert c.code(fake.execute(c.nv_write(b"12345"))) == 0x146
    assert c.code(fake.execute(c.nv_write(b"12"))) == c.SUCCESS
    assert c.nv_value(fake.execute(c.nv_read(4))) == b"12\xff\xff"
    assert c.code(fake.execute(c.nv_read(5))) == 0x146
    assert c.code(fake.execute(c.authorized(0x122, (c.OWNER, c.NV_INDEX), b""))) == c.SUCCESS
    assert c.code(fake.execute(c.nv_read(4))) == 0x28B
