"""Commands and responses longer than the buffer (PTP 1.06, TPM_CRB_CTRL_START_x.nextChunk and crbRspRetry)."""

from __future__ import annotations

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Execute
from crbd.crb.spec import Offset
from crbd.crb.states import State

from .driver import (
    CMD_READY,
    GO_IDLE,
    NEXT,
    RETRY,
    START,
    buffer_of,
    command,
    fill_buffer,
    put,
    ready,
    response,
    run,
    word,
)

PTP = CrbConfig(buffer_size=64, max_command=200)
QEMU = CrbConfig.qemu_11(10000)
both = pytest.mark.parametrize("config", [PTP, QEMU], ids=["ptp", "qemu"])


def long(config: CrbConfig, pieces: int, extra: int = 0) -> bytes:
    """A command of `pieces` full buffers and `extra` bytes."""
    size = pieces * config.buffer_size + extra
    return command(10)[:2] + size.to_bytes(4, "big") + bytes(index % 251 for index in range(size - 6))


def send(device: CrbDevice, data: bytes) -> Execute:
    """Piece by piece, the last with START."""
    step = device.config.buffer_size
    for at in range(0, len(data), step):
        fill_buffer(device, data[at : at + step])
        effects = put(device, Offset.CTRL_START, NEXT if at + step < len(data) else START)
        assert word(device, Offset.CTRL_START) == (0 if at + step < len(data) else 1)
    (effect,) = effects
    assert isinstance(effect, Execute)
    return effect


@both
@pytest.mark.parametrize(("pieces", "extra"), [(1, 1), (2, 0), (2, 1)])
def test_a_command_in_pieces(config: CrbConfig, pieces: int, extra: int) -> None:
    device = CrbDevice(config)
    ready(device)
    data = long(config, pieces, extra)
    assert send(device, data) == Execute(data, 0)


@both
def test_start_after_the_last_piece_was_sent(config: CrbConfig) -> None:
    """QEMU: chunks. What is complete already grows no more, whatever lies in the buffer."""
    device = CrbDevice(config)
    ready(device)
    data = long(config, 1, 20)
    for piece in (data[: config.buffer_size], data[config.buffer_size :], b"\xff" * 20):
        fill_buffer(device, piece)
        put(device, Offset.CTRL_START, NEXT)
    assert put(device, Offset.CTRL_START, START) == (Execute(data, 0),)


@both
def test_no_command_grows_beyond_what_the_tpm_takes(config: CrbConfig) -> None:
    """QEMU: chunk-limit-4096."""
    device = CrbDevice(config)
    ready(device)
    data = long(config, 4)
    assert send(device, data) == Execute(data[: config.max_command], 0)


@both
def test_a_response_in_pieces_and_again(config: CrbConfig) -> None:
    device = CrbDevice(config)
    size = config.buffer_size
    answer = response(2 * size + 7)[: config.max_command]
    run(device, answer=answer)
    for _ in range(2):
        assert buffer_of(device) == answer[:size]
        put(device, Offset.CTRL_START, NEXT)
        assert buffer_of(device) == answer[size : 2 * size]
        put(device, Offset.CTRL_START, RETRY)
        assert buffer_of(device) == answer[:size]
        put(device, Offset.CTRL_START, NEXT)
        put(device, Offset.CTRL_START, NEXT)
        assert buffer_of(device) == answer[2 * size :].ljust(size, b"\0")
        assert word(device, Offset.CTRL_START) == 0
        put(device, Offset.CTRL_START, RETRY)


@both
def test_next_goes_before_retry_and_start_before_both(config: CrbConfig) -> None:
    """QEMU: start-patterns."""
    device = CrbDevice(config)
    size = config.buffer_size
    answer = response(size + 7)
    run(device, answer=answer)
    put(device, Offset.CTRL_START, NEXT | RETRY)
    assert buffer_of(device, 7) == answer[size:]
    fill_buffer(device, command())
    assert put(device, Offset.CTRL_START, NEXT | RETRY | START) == (Execute(command(), 0),)


@both
def test_one_next_too_many_begins_a_command(config: CrbConfig) -> None:
    """QEMU: chunk-overrun. The response's last piece is taken for one."""
    device = CrbDevice(config)
    run(device)
    put(device, Offset.CTRL_START, NEXT)
    assert device.freeze().command == response()
    assert device.state is State.READY
    assert (device.freeze().response == b"") == (config is PTP)


def test_without_idle_bypass_no_next_is_too_many() -> None:
    device = CrbDevice(CrbConfig(idle_bypass=False))
    run(device)
    before = device.freeze()
    put(device, Offset.CTRL_START, NEXT)
    assert device.freeze() == before


@pytest.mark.parametrize("config", [CrbConfig(chunking=False), CrbConfig.qemu_7_2()], ids=["ptp", "qemu-7.2"])
def test_a_device_without_chunks(config: CrbConfig) -> None:
    """INTF_ID.CapCRBChunk = 0: the bits do nothing, and of a long response the beginning is all there is."""
    device = CrbDevice(config)
    answer = response(4000)
    run(device, answer=answer)
    assert buffer_of(device) == answer[:0xF80]
    before = device.freeze()
    assert before.response == b""
    for value in (NEXT, RETRY):
        assert put(device, Offset.CTRL_START, value) == ()
        assert device.freeze() == before


@both
def test_retry_without_a_response(config: CrbConfig) -> None:
    device = CrbDevice(config)
    ready(device)
    fill_buffer(device, command())
    before = device.freeze()
    put(device, Offset.CTRL_START, RETRY)
    assert device.freeze() == before


@both
def test_a_first_piece_shorter_than_a_head(config: CrbConfig) -> None:
    """QEMU: chunk-errors."""
    device = CrbDevice(config)
    run(device)
    fill_buffer(device, b"\x80\x01\0\0\0\x09")
    put(device, Offset.CTRL_START, NEXT)
    assert word(device, Offset.CTRL_STS) == 1
    assert (device.freeze().command, device.freeze().response, device.freeze().offset) == (b"", b"", 0)


@both
def test_cancel_drops_what_has_been_transferred(config: CrbConfig) -> None:
    """QEMU: chunk-abandoned."""
    device = CrbDevice(config)
    ready(device)
    fill_buffer(device, long(config, 2)[: config.buffer_size])
    put(device, Offset.CTRL_START, NEXT)
    put(device, Offset.CTRL_CANCEL, 1)
    assert device.freeze().command == b""
    run(device, answer=response(config.buffer_size + 1))
    put(device, Offset.CTRL_CANCEL, 1)
    assert (device.freeze().response, device.freeze().offset) == (b"", 0)


@pytest.mark.parametrize("request_", [CMD_READY, GO_IDLE])
def test_leaving_drops_what_has_been_transferred(request_: int) -> None:
    """PTP, figure "TPM State Diagram for CRB Interface"; QEMU keeps it (chunk-abandoned)."""
    for config in (PTP, QEMU):
        device = CrbDevice(config)
        ready(device)
        piece = long(config, 2)[: config.buffer_size]
        fill_buffer(device, piece)
        put(device, Offset.CTRL_START, NEXT)
        put(device, Offset.CTRL_REQ, request_)
        assert device.freeze().command == (piece if config is QEMU else b"")
        assert buffer_of(device) == piece


def test_no_piece_in_idle() -> None:
    device = CrbDevice(PTP)
    put(device, Offset.LOC_CTRL, 1)
    fill_buffer(device, command())
    before = device.freeze()
    put(device, Offset.CTRL_START, NEXT)
    assert device.freeze() == before


@both
def test_a_response_longer_than_the_tpm_gives_is_cut(config: CrbConfig) -> None:
    device = CrbDevice(config)
    run(device, answer=response(config.max_command + 5))
    assert device.freeze().response == response(config.max_command + 5)[: config.max_command]


@both
def test_an_empty_response(config: CrbConfig) -> None:
    device = CrbDevice(config)
    run(device, answer=b"")
    assert not any(buffer_of(device))
    assert device.freeze().response == b""
