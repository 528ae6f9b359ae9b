"""Random lives of a device: accesses that hit often, in between what the TPM, the platform and the data channel do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from hypothesis import strategies as st

from crbd.crb.config import BUFFER_OFFSET, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Busy, Effect
from crbd.crb.spec import Offset

from .driver import command, response

Action = tuple[str, int, int, bytes]
"""What, locality, offset or flag, bytes."""

_OFFSETS = st.one_of(
    st.sampled_from([Offset.LOC_CTRL, Offset.CTRL_REQ, Offset.CTRL_START, Offset.CTRL_CANCEL, Offset.INT_ENABLE]),
    st.integers(0, 0x7F),
)
_VALUES = st.one_of(st.sampled_from([0, 1, 2, 4, 8, 3, 6]), st.integers(0, 0xFFFFFFFF))


@cache
def actions(config: CrbConfig, *, submits: bool = True) -> st.SearchStrategy[Action]:
    """One action for a device of `config`; localities and sizes around every bound."""
    localities = st.integers(0, config.localities - 1)
    sizes = st.sampled_from(sorted({12, 10, config.buffer_size, config.buffer_size + 1, config.max_command}))
    answers = st.sampled_from(sorted({0, 10, 28, config.buffer_size, config.buffer_size + 9, config.max_command}))
    requests = st.sampled_from(
        [(Offset.LOC_CTRL, 1), (Offset.LOC_CTRL, 2), (Offset.LOC_CTRL, 4), (Offset.CTRL_REQ, 1), (Offset.CTRL_REQ, 2),
         (Offset.CTRL_START, 1), (Offset.CTRL_START, 1), (Offset.CTRL_START, 4), (Offset.CTRL_START, 2),
         (Offset.CTRL_CANCEL, 1)]
    )  # fmt: skip
    kinds: list[st.SearchStrategy[Action]] = [
        st.builds(lambda at, request: ("write", at, request[0], _word(request[1])), localities, requests),
        st.builds(lambda at, request: ("write", at, request[0], _word(request[1])), localities, requests),
        st.builds(
            lambda at, offset, value, width: ("write", at, offset, value.to_bytes(8, "little")[:width]),
            localities, _OFFSETS, _VALUES, st.sampled_from([1, 2, 4, 8]),
        ),
        st.builds(lambda size: ("fill", 0, 0, command(size)[: config.buffer_size]), sizes),
        st.builds(lambda at, data: ("fill", 0, at, data), st.integers(0, 0xF70), st.binary(min_size=1, max_size=9)),
        st.builds(lambda size: ("complete", 0, 0, response(max(size, 10))[:size]), answers),
        st.builds(lambda size: ("complete", 0, 0, response(max(size, 10))[:size]), answers),
        st.sampled_from([("fail", 0, 0, b""), ("reset", 0, 0, b""), ("established", 0, 0, b""),
                         ("established", 0, 1, b""), ("refreeze", 0, 0, b"")]),
    ]  # fmt: skip
    if submits:
        kinds.append(st.builds(lambda at, size: ("submit", at, 0, command(size)), localities, sizes))
    return st.one_of(kinds)


def _word(value: int) -> bytes:
    return value.to_bytes(4, "little")


def act(
    device: CrbDevice,
    action: Action,
    write: Callable[[int, int, bytes], tuple[Effect, ...]],
) -> tuple[Effect | Busy, ...]:
    """Do it; `write` takes locality, offset in its page (the buffer at 0x80) and bytes. All but `refreeze`."""
    kind, locality, number, data = action
    match kind:
        case "write":
            return write(locality, number, data)
        case "fill":
            # A driver writes its own buffer; what others' writes do is said in test_localities.
            return write(device.freeze().owner, BUFFER_OFFSET + number, data)
        case "complete":
            device.complete(data)
        case "fail":
            device.fail()
        case "reset":
            return device.reset()
        case "established":
            device.set_established(bool(number))
        case "submit":
            return (device.submit(locality, data),)
    return ()
