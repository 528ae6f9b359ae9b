"""What the keeper of an ephemeral TPM asks of it on its control channel (docs/control-channel.md)."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Final

from crbd.control import messages as m
from crbd.control.client import ReplyDecoder
from crbd.errors import DaemonError, WireError

TIMEOUT: Final = 30.0
"""Seconds that the TPM may take for an answer; a command under way comes first."""


def reset(control: Path) -> None:
    """INIT. Raises DaemonError."""
    reply = _ask(control, m.Init(m.InitFlag(0)))
    if not isinstance(reply, m.Done):
        raise _refused("be reset", reply)


def take_snapshot(control: Path) -> bytes:
    """TAKE_SNAPSHOT. Raises DaemonError."""
    reply = _ask(control, m.TakeSnapshot())
    if not (isinstance(reply, m.Snapshot) and reply.done):
        raise _refused("give a snapshot", reply)
    return reply.document


def restore(control: Path, document: bytes) -> None:
    """RESTORE, back in time too. Raises DaemonError."""
    reply = _ask(control, m.Restore(m.RestoreFlag.ALLOW_ROLLBACK, document))
    if not (isinstance(reply, m.Outcome) and reply.done):
        raise _refused("be as the snapshot says", reply)


def _refused(what: str, reply: m.Reply) -> DaemonError:
    match reply:
        case m.Snapshot(_, text) | m.Outcome(_, text):
            reason = text.decode(errors="replace")
        case m.Failure(result):
            reason = f"TPM_RESULT 0x{result:x}"
        case _:
            reason = f"it answers with {type(reply).__name__}"
    return DaemonError(f"the TPM would not {what}: {reason}", "see what it said")


def _ask(control: Path, request: m.Request) -> m.Reply:
    decoder = ReplyDecoder()
    decoder.expect(type(request))
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connected:
            connected.settimeout(TIMEOUT)
            connected.connect(str(control))
            connected.sendall(m.encode_request(request))
            while (reply := decoder.next_reply()) is None:
                piece = connected.recv(1 << 16)
                if not piece:
                    raise DaemonError("the TPM has closed its control channel", "see what it said")
                decoder.receive(piece)
    except (OSError, WireError) as error:
        raise DaemonError(f"the TPM does not answer on its control channel: {error}", "see what it said") from error
    return reply
