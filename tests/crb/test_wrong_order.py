"""Writes in the wrong order, at the wrong time, of the wrong width: each with the place that says what comes of it.

PTP is the TCG PC Client Platform TPM Profile 1.05/1.06; table and figure titles are used as its section numbers moved
from revision to revision. QEMU is its device's behaviour as the traces in vectors/ have it.
"""

from __future__ import annotations

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Execute
from crbd.crb.spec import Offset
from crbd.crb.states import State

from .driver import (
    CMD_READY,
    GO_IDLE,
    NEXT,
    RELINQUISH,
    REQUEST_ACCESS,
    RETRY,
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

ALL = [CrbConfig(), CrbConfig(idle_bypass=False), CrbConfig.qemu_7_2(), CrbConfig.qemu_11()]
everywhere = pytest.mark.parametrize("config", ALL, ids=["ptp", "ptp-no-bypass", "qemu-7.2", "qemu-11"])


def unchanged_by(device: CrbDevice, offset: Offset, value: int, locality: int = 0) -> bool:
    before = device.freeze()
    assert put(device, offset, value, locality) == ()
    return device.freeze() == before


@everywhere
def test_start_without_a_locality(config: CrbConfig) -> None:
    """PTP, table "TPM_CRB_CTRL_START_x": for the active locality alone. QEMU: start-without-locality."""
    device = CrbDevice(config)
    put(device, Offset.CTRL_REQ, CMD_READY)
    fill_buffer(device, command())
    assert unchanged_by(device, Offset.CTRL_START, START)
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS)
    put(device, Offset.LOC_CTRL, RELINQUISH)
    assert unchanged_by(device, Offset.CTRL_START, START)


def test_start_in_idle_is_ignored() -> None:
    """PTP, figure "TPM State Diagram for CRB Interface": Idle has one way out, cmdReady."""
    device = CrbDevice(CrbConfig())
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS)
    fill_buffer(device, command())
    assert unchanged_by(device, Offset.CTRL_START, START)


def test_start_in_idle_executes_on_qemu() -> None:
    """QEMU: start-in-idle."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS)
    fill_buffer(device, command())
    assert put(device, Offset.CTRL_START, START) == (Execute(command(), 0),)
    assert word(device, Offset.CTRL_STS) == 2


@everywhere
def test_a_second_start_while_executing(config: CrbConfig) -> None:
    """PTP, table "TPM_CRB_CTRL_START_x": Start is the TPM's to clear. QEMU: accesses-in-execution."""
    device = CrbDevice(config)
    start(device)
    for value in (START, NEXT, RETRY, 0, 7):
        assert unchanged_by(device, Offset.CTRL_START, value)


def test_requests_for_a_state_while_executing() -> None:
    """PTP, figure "TPM State Diagram for CRB Interface": Execution ends by itself or by Cancel."""
    device = CrbDevice(CrbConfig())
    start(device)
    assert unchanged_by(device, Offset.CTRL_REQ, CMD_READY)
    assert unchanged_by(device, Offset.CTRL_REQ, GO_IDLE)


def test_going_idle_while_executing_on_qemu() -> None:
    """QEMU: accesses-in-execution. tpmIdle shows at once; the response comes all the same."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    start(device)
    put(device, Offset.CTRL_REQ, GO_IDLE)
    assert (word(device, Offset.CTRL_STS), word(device, Offset.CTRL_START)) == (2, 1)
    put(device, Offset.CTRL_REQ, CMD_READY)
    assert (word(device, Offset.CTRL_STS), word(device, Offset.CTRL_START)) == (0, 1)
    put(device, Offset.CTRL_REQ, GO_IDLE)
    device.complete(response())
    assert (word(device, Offset.CTRL_STS), word(device, Offset.CTRL_START)) == (2, 0)
    assert buffer_of(device, 28) == response()


@everywhere
def test_two_requests_at_once(config: CrbConfig) -> None:
    """PTP, tables "TPM_LOC_CTRL_x" and "TPM_CRB_CTRL_REQ_x": one of them. QEMU: locality, idle-and-ready: neither."""
    device = CrbDevice(config)
    for value in (0, 3, 5, 9, 0x10, 0x101, 0x80000001):
        assert unchanged_by(device, Offset.LOC_CTRL, value)
        assert unchanged_by(device, Offset.CTRL_REQ, value)


@everywhere
def test_after_a_response(config: CrbConfig) -> None:
    """PTP, figure "TPM State Diagram for CRB Interface": Completion goes to Ready only with CapCRBIdleBypass."""
    device = CrbDevice(config)
    run(device)
    ready_at_once = config != CrbConfig(idle_bypass=False)
    fill_buffer(device, command())
    effects = put(device, Offset.CTRL_START, START)
    assert effects == ((Execute(command(), 0),) if ready_at_once else ())
    if not ready_at_once:
        assert unchanged_by(device, Offset.CTRL_REQ, CMD_READY)
        put(device, Offset.CTRL_REQ, GO_IDLE)
        assert start(device) == (Execute(command(), 0),)


@pytest.mark.parametrize("request_", [CMD_READY, GO_IDLE])
def test_leaving_completion_clears_the_buffer(request_: int) -> None:
    """PTP, figure "TPM State Diagram for CRB Interface", on both arrows out of Completion."""
    device = CrbDevice(CrbConfig())
    run(device)
    assert buffer_of(device, 28) == response()
    put(device, Offset.CTRL_REQ, request_)
    assert not any(buffer_of(device))
    assert device.freeze().response == b""


@pytest.mark.parametrize("request_", [CMD_READY, GO_IDLE])
def test_qemus_buffer_is_memory_and_stays(request_: int) -> None:
    """QEMU: commands, chunk-abandoned."""
    device = CrbDevice(CrbConfig.qemu_11())
    run(device)
    put(device, Offset.CTRL_REQ, request_)
    assert buffer_of(device, 28) == response()
    put(device, Offset.CTRL_START, RETRY)
    assert device.freeze().response == response()


@pytest.mark.parametrize("config", [CrbConfig(), CrbConfig(idle_bypass=False), CrbConfig.qemu_11()])
@pytest.mark.parametrize("size", range(10))
def test_a_command_shorter_than_a_head(config: CrbConfig, size: int) -> None:
    """QEMU 11: command-sizes. A fatal error, and no command; PTP leaves it open."""
    device = CrbDevice(config)
    assert start(device, b"\x80\x01" + size.to_bytes(4, "big") + bytes(4)) == ()
    assert (word(device, Offset.CTRL_STS), word(device, Offset.CTRL_START)) == (1, 0)
    assert device.state is State.READY


@pytest.mark.parametrize("size", range(10))
def test_a_command_shorter_than_a_head_goes_to_the_tpm_on_qemu_7(size: int) -> None:
    """QEMU 7.2: command-sizes."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    data = b"\x80\x01" + size.to_bytes(4, "big") + bytes(4)
    assert start(device, data) == (Execute(data[:size], 0),)


@pytest.mark.parametrize("size", [10, 0xF7F, 0xF80])
@everywhere
def test_a_command_up_to_the_buffer(config: CrbConfig, size: int) -> None:
    """PTP, register TPM_CRB_CTRL_CMD_SIZE_x."""
    assert start(CrbDevice(config), command(size)) == (Execute(command(size), 0),)


@pytest.mark.parametrize("size", [0xF81, 0x1000, 0x1001, 0x01000000, 0xFFFFFFFF])
@everywhere
def test_a_command_that_says_it_is_longer_than_the_buffer(config: CrbConfig, size: int) -> None:
    """QEMU: command-sizes. The buffer goes to the TPM, which answers TPM_RC_COMMAND_SIZE."""
    data = (b"\x80\x01" + size.to_bytes(4, "big")).ljust(0xF80, b"\x11")
    assert start(CrbDevice(config), data) == (Execute(data, 0),)


@everywhere
def test_a_command_longer_than_the_tpm_takes(config: CrbConfig) -> None:
    """QEMU: chunk-limit-4096, and the same below the buffer's size."""
    device = CrbDevice(CrbConfig(max_command=100, idle_bypass=config.idle_bypass))
    assert start(device, command(200)) == (Execute(command(200)[:100], 0),)


@pytest.mark.parametrize("value", [2, 3, 4, 5, 6, 0x101, 0x80000001, 0x100])
def test_start_with_other_bits(value: int) -> None:
    """PTP 1.06, table "TPM_CRB_CTRL_START_x"; QEMU: start-patterns. Before QEMU 11.1 it is 1 or nothing."""
    old, new = CrbDevice(CrbConfig.qemu_7_2()), CrbDevice(CrbConfig.qemu_11())
    for device in (old, new):
        ready(device)
        fill_buffer(device, command())
    assert unchanged_by(old, Offset.CTRL_START, value)
    assert put(new, Offset.CTRL_START, value) == ((Execute(command(), 0),) if value & START else ())


@pytest.mark.parametrize("value", [0, 2, 3, 0x100, 0xFFFFFFFF])
@everywhere
def test_cancel_is_one_alone(config: CrbConfig, value: int) -> None:
    """PTP, table "TPM_CRB_CTRL_CANCEL_x"; QEMU: cancel."""
    device = CrbDevice(config)
    start(device)
    assert unchanged_by(device, Offset.CTRL_CANCEL, value)


@everywhere
def test_cancel_outside_execution_reaches_nobody(config: CrbConfig) -> None:
    """PTP, table "TPM_CRB_CTRL_CANCEL_x"; QEMU: cancel."""
    device = CrbDevice(config)
    assert put(device, Offset.CTRL_CANCEL, 1) == ()
    run(device)
    assert put(device, Offset.CTRL_CANCEL, 1) == ()


@everywhere
def test_cancel_as_often_as_wanted(config: CrbConfig) -> None:
    """QEMU: cancel. START stays until the TPM has given up."""
    device = CrbDevice(config)
    start(device)
    for _ in range(2):
        assert put(device, Offset.CTRL_CANCEL, 1) == (Cancel(),)
        assert word(device, Offset.CTRL_START) == 1
    device.complete(response())
    assert word(device, Offset.CTRL_START) == 0
    assert buffer_of(device, 28) == response()


def test_cancel_reads_back_until_it_is_cleared() -> None:
    """PTP, table "TPM_CRB_CTRL_CANCEL_x": software writes 0 once the command is gone. QEMU's reads 0."""
    device, qemu = CrbDevice(CrbConfig()), CrbDevice(CrbConfig.qemu_11())
    for each in (device, qemu):
        start(each)
        put(each, Offset.CTRL_CANCEL, 1)
    assert (word(device, Offset.CTRL_CANCEL), word(qemu, Offset.CTRL_CANCEL)) == (1, 0)
    device.complete(response())
    assert word(device, Offset.CTRL_CANCEL) == 1
    put(device, Offset.CTRL_CANCEL, 0)
    assert word(device, Offset.CTRL_CANCEL) == 0


@everywhere
def test_read_only_registers(config: CrbConfig) -> None:
    """PTP, table "Address Allocation for CRB TPM Access"; QEMU: write-patterns, write-reserved."""
    device = CrbDevice(config)
    writable = {Offset.LOC_CTRL, Offset.CTRL_REQ, Offset.CTRL_CANCEL, Offset.CTRL_START, Offset.INT_ENABLE}
    before = device.freeze()
    for at in range(0, 0x80, 4):
        if at not in writable:
            assert device.write(0, at, b"\xff" * 4) == ()
    assert device.freeze() == before


def test_interrupt_enable_is_remembered_by_its_lanes() -> None:
    """PTP, table "TPM_CRB_INT_ENABLE_x". No interrupt is raised; QEMU's register reads 0."""
    device = CrbDevice(CrbConfig())
    put(device, Offset.INT_ENABLE, 0xFFFFFFFF)
    assert word(device, Offset.INT_ENABLE) == 0x8000001F
    device.write(0, Offset.INT_ENABLE + 3, b"\x7f")
    assert word(device, Offset.INT_ENABLE) == 0x0000001F
    device.write(0, Offset.INT_ENABLE, b"\x0a\xff")
    assert word(device, Offset.INT_ENABLE) == 0x0000000A
    device.write(0, Offset.INT_ENABLE + 2, b"\xff\xff")
    assert word(device, Offset.INT_ENABLE) == 0x8000000A
    device.write(0, Offset.INT_ENABLE - 2, b"\xff\xff\x05\xff")
    assert word(device, Offset.INT_ENABLE) == 0x80000005
    assert word(device, Offset.INT_STS) == 0
    qemu = CrbDevice(CrbConfig.qemu_11())
    assert unchanged_by(qemu, Offset.INT_ENABLE, 0xFFFFFFFF)


@everywhere
def test_partial_writes_touch_their_lanes_only(config: CrbConfig) -> None:
    """QEMU: write-unaligned, write-patterns. What does not begin with the register does not act on it."""
    device = CrbDevice(config)
    before = device.freeze()
    for lane in (1, 2, 3):
        assert device.write(0, Offset.LOC_CTRL + lane, b"\x01") == ()
        assert device.write(0, Offset.CTRL_REQ + lane, b"\x01") == ()
    assert device.freeze() == before
    device.write(0, Offset.LOC_CTRL, b"\x01")
    assert word(device, Offset.LOC_STS) == 1
    device.write(0, Offset.CTRL_REQ, b"\x01\x00")
    fill_buffer(device, command())
    # The register's upper half goes with the bytes before it: 2 at 0x4A, 2 at 0x4C, 2 at 0x4E, 2 at 0x50.
    assert device.write(0, Offset.CTRL_START - 2, b"\x00\x00\x01\x00\x00\x00\x00\x00") == (Execute(command(), 0),)


def test_a_piece_counts_with_all_its_lanes_and_no_others() -> None:
    """QEMU: write-unaligned. 4 bytes at 0x3F are 1 at 0x3F, 2 at CTRL_REQ, 1 at 0x42."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    device.write(0, Offset.CTRL_REQ, b"\x01\x01")
    assert word(device, Offset.CTRL_STS) == 2
    device.write(0, Offset.CTRL_REQ - 1, b"\x00\x01\x00\x01")
    assert word(device, Offset.CTRL_STS) == 0


def test_an_access_of_8_bytes_is_two_in_order() -> None:
    """QEMU: write-unaligned. Here Cancel, which comes before the command and so has nothing to cancel, then START."""
    device = CrbDevice(CrbConfig.qemu_7_2())
    ready(device)
    fill_buffer(device, command())
    both = b"\x01\x00\x00\x00\x01\x00\x00\x00"
    assert device.write(0, Offset.CTRL_CANCEL, both) == (Execute(command(), 0),)
    assert device.write(0, Offset.CTRL_CANCEL, both) == (Cancel(),)


@everywhere
def test_writes_across_the_end_of_the_registers(config: CrbConfig) -> None:
    """QEMU: buffer-writes."""
    device = CrbDevice(config)
    assert device.write(0, 0x7D, b"\x11\x22\x33\x44\x55\x66") == ()
    assert device.read(0, 0x78, 8) == bytes(8)
    assert buffer_of(device, 5) == b"\x44\x55\x66\x00\x00"


def test_what_lies_behind_a_small_buffer_is_not_there() -> None:
    """PTP, table "Address Allocation for CRB TPM Access": reserved."""
    device = CrbDevice(CrbConfig(buffer_size=0x100))
    device.write(0, 0x17E, b"\xff" * 4)
    device.write(0, 0x180, b"\xff" * 4)
    device.write(0, 0x200, b"\xff")
    assert device.read(0, 0x17C, 0x84) == b"\0\0\xff\xff" + bytes(0x80)


@everywhere
def test_the_buffer_during_execution(config: CrbConfig) -> None:
    """QEMU: buffer-in-execution. The command is out of it already, the response comes over it."""
    device = CrbDevice(config)
    start(device)
    fill_buffer(device, b"\x99" * 40)
    assert device.executing == Execute(command(), 0)
    device.complete(response(20))
    tail = b"\x99" * 20 if config == CrbConfig.qemu_7_2() else bytes(20)
    assert buffer_of(device, 40) == response(20) + tail


@everywhere
def test_a_fatal_error(config: CrbConfig) -> None:
    """PTP, table "TPM_CRB_CTRL_STS_x", tpmSts; QEMU: failure. Commands go on, a reset ends it."""
    device = CrbDevice(config)
    start(device)
    device.fail()
    assert (word(device, Offset.CTRL_STS), word(device, Offset.CTRL_START)) == (1, 0)
    failure = bytes.fromhex("00c40000000a00000009") if config == CrbConfig.qemu_7_2() else bytes(10)
    assert buffer_of(device, 10) == failure
    put(device, Offset.CTRL_REQ, GO_IDLE)
    assert word(device, Offset.CTRL_STS) == 3
    run(device)
    assert word(device, Offset.CTRL_STS) == 1
    assert device.reset() == ()
    assert word(device, Offset.CTRL_STS) == 2


@everywhere
def test_a_reset_while_executing(config: CrbConfig) -> None:
    """PTP, section on _TPM_Init. The answer that comes too late is nobody's."""
    device = CrbDevice(config)
    device.set_established(True)
    fresh = CrbDevice(config)
    fresh.set_established(True)
    start(device)
    kept = buffer_of(device)
    assert device.reset() == (Cancel(),)
    if config.localities == 1:
        fill_buffer(fresh, kept)
    assert device.freeze() == fresh.freeze()
    device.complete(response())
    device.fail()
    assert device.freeze() == fresh.freeze()
    assert device.executing is None


@everywhere
def test_answers_without_a_command(config: CrbConfig) -> None:
    device = CrbDevice(config)
    before = device.freeze()
    device.complete(response())
    device.fail()
    assert device.freeze() == before
