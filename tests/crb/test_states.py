"""The transitions, by driving a device into every state and asking everything there."""

from __future__ import annotations

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Execute
from crbd.crb.spec import Offset
from crbd.crb.states import Request, State, transitions

from .driver import CMD_READY, GO_IDLE, NEXT, START, command, fill_buffer, put, ready, response, start, word

PTP = CrbConfig()
NO_BYPASS = CrbConfig(idle_bypass=False)
QEMU = CrbConfig.qemu_11()

# PTP, figure "TPM State Diagram for CRB Interface", and CapCRBIdleBypass of INTF_ID; None: the request is ignored.
# In the order cmdReady, goIdle, Start, nextChunk, done.
WANTED: dict[str, tuple[CrbConfig, dict[State, tuple[State | None, ...]]]] = {
    "idle bypass": (
        PTP,
        {
            State.IDLE: (State.READY, None, None, None, None),
            State.READY: (State.READY, State.IDLE, State.EXECUTION, State.READY, None),
            State.EXECUTION: (None, None, None, None, State.COMPLETION),
            State.COMPLETION: (State.READY, State.IDLE, State.EXECUTION, State.READY, None),
            State.EXECUTION_IDLE: (None, None, None, None, None),
        },
    ),
    "through idle": (
        NO_BYPASS,
        {
            State.IDLE: (State.READY, None, None, None, None),
            State.READY: (State.READY, State.IDLE, State.EXECUTION, State.READY, None),
            State.EXECUTION: (None, None, None, None, State.COMPLETION),
            State.COMPLETION: (None, State.IDLE, None, None, None),
            State.EXECUTION_IDLE: (None, None, None, None, None),
        },
    ),
    "qemu": (
        QEMU,
        {
            State.IDLE: (State.READY, State.IDLE, State.EXECUTION_IDLE, State.IDLE, None),
            State.READY: (State.READY, State.IDLE, State.EXECUTION, State.READY, None),
            State.EXECUTION: (State.EXECUTION, State.EXECUTION_IDLE, None, None, State.READY),
            State.COMPLETION: (None, None, None, None, None),
            State.EXECUTION_IDLE: (State.EXECUTION, State.EXECUTION_IDLE, None, None, State.IDLE),
        },
    ),
}
UNREACHABLE = {
    "idle bypass": {State.EXECUTION_IDLE},
    "through idle": {State.EXECUTION_IDLE},
    "qemu": {State.COMPLETION},
}
CASES = [
    (name, state, request, wanted[index])
    for name, (_, rows) in WANTED.items()
    for state, wanted in rows.items()
    if state not in UNREACHABLE[name]
    for index, request in enumerate(Request)
]


def device_in(config: CrbConfig, state: State) -> CrbDevice:
    """A device driven into `state`, with locality 0 active."""
    device = CrbDevice(config)
    if state in (State.IDLE, State.EXECUTION_IDLE):
        put(device, Offset.LOC_CTRL, 1)
    else:
        ready(device)
    if state in (State.EXECUTION, State.EXECUTION_IDLE, State.COMPLETION):
        start_here(device)
    if state is State.COMPLETION:
        device.complete(response())
    assert device.state is state
    return device


def start_here(device: CrbDevice) -> None:
    fill_buffer(device, command())
    assert put(device, Offset.CTRL_START, START) == (Execute(command(), 0),)


@pytest.mark.parametrize(("name", "state", "request_", "wanted"), CASES, ids=str)
def test_a_request_in_a_state(name: str, state: State, request_: Request, wanted: State | None) -> None:
    device = device_in(WANTED[name][0], state)
    before = device.freeze()
    match request_:
        case Request.CMD_READY:
            put(device, Offset.CTRL_REQ, CMD_READY)
        case Request.GO_IDLE:
            put(device, Offset.CTRL_REQ, GO_IDLE)
        case Request.START:
            fill_buffer(device, command())
            before = device.freeze()
            assert put(device, Offset.CTRL_START, START) == ((Execute(command(), 0),) if wanted is not None else ())
        case Request.PIECE:
            fill_buffer(device, command())
            before = device.freeze()
            put(device, Offset.CTRL_START, NEXT)
        case Request.DONE:
            device.complete(response())
    if wanted is None:
        assert device.freeze() == before
    else:
        assert device.state is wanted
        assert word(device, Offset.CTRL_STS) == (2 if wanted in (State.IDLE, State.EXECUTION_IDLE) else 0)
        assert word(device, Offset.CTRL_START) == int(wanted in (State.EXECUTION, State.EXECUTION_IDLE))


def test_the_table_has_nothing_else() -> None:
    for name, (config, rows) in WANTED.items():
        table = transitions(config)
        columns = (table.cmd_ready, table.go_idle, table.start, table.piece, table.done)
        for state in State:
            assert tuple(column[state] for column in columns) == rows[state], (name, state)


@pytest.mark.parametrize("name", WANTED)
def test_submit_and_failure_take_the_same_way(name: str) -> None:
    device = CrbDevice(WANTED[name][0])
    for _ in range(2):
        assert device.submit(0, command()) == Execute(command(), 0)
        assert device.state is State.EXECUTION
        device.fail()
        assert device.state is (State.READY if name == "qemu" else State.COMPLETION)


def test_a_whole_cycle() -> None:
    device = CrbDevice(NO_BYPASS)
    for _ in range(3):
        assert start(device) == (Execute(command(), 0),)
        device.complete(response())
        put(device, Offset.CTRL_REQ, GO_IDLE)
        assert device.state is State.IDLE
