"""The data channel's one call against the sequence of register writes that it stands for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crbd.crb.config import BUFFER_OFFSET, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Busy, Cancel, Effect, Execute
from crbd.crb.spec import Offset
from crbd.crb.states import State

from .driver import (
    CMD_READY,
    GO_IDLE,
    NEXT,
    RELINQUISH,
    REQUEST_ACCESS,
    START,
    buffer_of,
    command,
    fill_buffer,
    put,
    ready,
    response,
    run,
    start,
    word,
)
from .histories import act, actions

CONFIGS = {
    "ptp": CrbConfig(localities=4, buffer_size=64, max_command=200),
    "ptp-no-bypass": CrbConfig(localities=4, buffer_size=64, max_command=200, idle_bypass=False),
    "qemu-11": CrbConfig.qemu_11(9000),
}


def by_writes(device: CrbDevice, locality: int, data: bytes) -> tuple[Effect, ...]:
    """The documented sequence."""
    active = device.active_locality
    if active not in (None, locality):
        assert put(device, Offset.LOC_CTRL, RELINQUISH, active) == ()
    assert put(device, Offset.LOC_CTRL, REQUEST_ACCESS, locality) == ()
    room = device.config.buffer_size
    now = device.freeze()
    if now.command or (len(data) > room and now.offset < len(now.response)):
        put(device, Offset.CTRL_CANCEL, 1, locality)
        put(device, Offset.CTRL_CANCEL, 0, locality)
    if device.state is State.COMPLETION and not device.config.idle_bypass:
        put(device, Offset.CTRL_REQ, GO_IDLE, locality)
    put(device, Offset.CTRL_REQ, CMD_READY, locality)
    effects: tuple[Effect, ...] = ()
    for at in range(0, len(data), room):
        assert device.write(locality, BUFFER_OFFSET, data[at : at + room]) == ()
        last = at + room >= len(data)
        effects += put(device, Offset.CTRL_START, START if last else NEXT, locality)
    return effects


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_submit_is_the_sequence_of_writes(name: str, data: st.DataObject) -> None:
    config = CONFIGS[name]
    one, other = CrbDevice(config), CrbDevice(config)
    for action in data.draw(st.lists(actions(config, submits=False), max_size=25)):
        assert act(one, action, one.write) == act(other, action, other.write)
    for size in data.draw(
        st.lists(st.sampled_from([10, 12, 64, 65, 128, 200, 3968, 3969, 9000]), min_size=1, max_size=4)
    ):
        locality = data.draw(st.integers(0, config.localities - 1))
        body = command(min(size, config.max_command), fill=size % 251)
        check_one(one, other, locality, body, response(data.draw(st.integers(10, config.max_command))))


def check_one(one: CrbDevice, other: CrbDevice, locality: int, body: bytes, answer: bytes) -> None:
    before = one.freeze()
    result = one.submit(locality, body)
    if isinstance(result, Busy):
        assert one.freeze() == before
        assert result.executing == before.state.executing
        assert result.executing or before.pending
        return
    assert by_writes(other, locality, body) == (result,) == (Execute(body, locality),)
    assert one.freeze() == other.freeze()
    assert one.executing == result
    one.complete(answer)
    other.complete(answer)
    assert one.freeze() == other.freeze()


def test_the_registers_tell_while_it_executes() -> None:
    device = CrbDevice(CrbConfig())
    assert device.submit(3, command()) == Execute(command(), 3)
    assert device.active_locality == 3
    assert (word(device, Offset.CTRL_START, 3), word(device, Offset.CTRL_STS, 3)) == (1, 0)
    assert buffer_of(device, 12, 3) == command()
    device.complete(response())
    assert (word(device, Offset.CTRL_START, 3), buffer_of(device, 29, 3)) == (0, response() + b"\0")


def test_busy_while_executing() -> None:
    device = CrbDevice(CrbConfig())
    start(device)
    for locality in (0, 1):
        assert device.submit(locality, command()) == Busy(executing=True)
    qemu = CrbDevice(CrbConfig.qemu_11())
    start(qemu)
    put(qemu, Offset.CTRL_REQ, GO_IDLE)
    assert qemu.submit(0, command()) == Busy(executing=True)


def test_busy_with_a_command_of_no_bytes() -> None:
    """QEMU 7.2 sends what the head says, be it nothing."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    assert start(device, bytes(10)) == (Execute(b"", 0),)
    assert device.submit(0, command()) == Busy(executing=True)


def test_busy_where_another_waits() -> None:
    device = CrbDevice(CrbConfig())
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS, 1)
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS, 2)
    before = device.freeze()
    assert device.submit(0, command()) == Busy(executing=False)
    assert device.freeze() == before
    assert device.submit(2, command()) == Execute(command(), 2)
    assert device.freeze().pending == 0


def test_the_data_channel_takes_the_tpm_from_an_idle_locality() -> None:
    device = CrbDevice(CrbConfig())
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS, 1)
    assert device.submit(0, command()) == Execute(command(), 0)
    assert (word(device, Offset.LOC_STS, 0), word(device, Offset.LOC_STS, 1)) == (1, 0)


def test_locality_4_without_a_hash_sequence() -> None:
    """SET_LOCALITY 4 of the control channel; by registers, locality 4 has no requestAccess."""
    device = CrbDevice(CrbConfig())
    run(device)
    assert device.submit(4, command()) == Execute(command(), 4)
    assert (device.active_locality, word(device, Offset.LOC_STS, 4), word(device, Offset.LOC_STS, 0)) == (4, 1, 0)
    device.complete(response())
    assert device.submit(0, command()) == Execute(command(), 0)
    assert not any(buffer_of(device, locality=4))


@pytest.mark.parametrize("config", [CrbConfig(chunking=False), CrbConfig.qemu_7_2()], ids=["ptp", "qemu-7.2"])
def test_a_long_command_without_chunks(config: CrbConfig) -> None:
    """The engine gets it whole; the buffer shows its beginning."""
    device = CrbDevice(config)
    body = command(4000)
    assert device.submit(0, body) == Execute(body, 0)
    assert buffer_of(device) == body[:0xF80]
    device.complete(response())
    assert device.submit(0, command()) == Execute(command(), 0)


def test_a_begun_command_gives_way() -> None:
    """The register is left as a driver leaves it that cancels: 0."""
    for config in (CONFIGS["ptp"], CONFIGS["qemu-11"]):
        device = CrbDevice(config)
        ready(device)
        fill_buffer(device, command(config.max_command)[: config.buffer_size])
        put(device, Offset.CTRL_START, NEXT)
        assert device.freeze().command
        assert device.submit(0, command()) == Execute(command(), 0)


def test_cancel_is_left_alone_where_no_transfer_is_in_the_way() -> None:
    """A guest that never wrote its 0 finds its 1 again."""
    config = CONFIGS["ptp"]
    for size, answer in ((65, response(20)), (64, response(100))):
        device = CrbDevice(config)
        run(device, answer=answer)
        put(device, Offset.CTRL_REQ, CMD_READY)
        put(device, Offset.CTRL_CANCEL, 1)
        assert device.submit(0, command(size)) == Execute(command(size), 0)
        assert word(device, Offset.CTRL_CANCEL) == 1


def test_no_command_is_longer_than_the_tpm_takes() -> None:
    """Also where the buffer has room for it."""
    device = CrbDevice(CrbConfig(max_command=100))
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS)
    with pytest.raises(ValueError, match="at most 100"):
        device.submit(0, command(101))
    assert device.submit(0, command(100)) == Execute(command(100), 0)


def test_cancel_reaches_a_submitted_command() -> None:
    device = CrbDevice(CrbConfig())
    device.submit(0, command())
    assert put(device, Offset.CTRL_CANCEL, 1) == (Cancel(),)


@pytest.mark.parametrize(
    "body",
    [b"", command(10)[:9], command() + b"\0", command()[:-1], command(4097), b"\x80\x01\0\0\0\x06"],
    ids=["nothing", "cut", "trailing", "cut-parameters", "too-long", "lies-short"],
)
@pytest.mark.parametrize("granted", [False, True])
def test_what_is_no_command(body: bytes, granted: bool) -> None:
    device = CrbDevice(CrbConfig())
    if granted:
        ready(device)
    before = device.freeze()
    with pytest.raises(ValueError, match="not one TPM command of at most 4096"):
        device.submit(0, body)
    assert device.freeze() == before


@pytest.mark.parametrize("locality", [-1, 5])
def test_a_locality_that_is_not_there(locality: int) -> None:
    with pytest.raises(ValueError, match="in no page"):
        CrbDevice(CrbConfig()).submit(locality, command())


def test_the_longest_and_shortest() -> None:
    device = CrbDevice(CrbConfig())
    for size in (10, 4096):
        assert device.submit(0, command(size)) == Execute(command(size), 0)
        device.complete(response(size))
