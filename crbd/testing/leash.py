"""The leash: the one connection between an ephemeral TPM and who keeps it, a packet socket pair.

The TPM lives as long as the other end is open, so none outlives its keeper, however that one ends. Over it goes what
must not come from those who use the TPM: faults. A packet is a JSON object in UTF-8, and each request has one answer:

    the TPM begins                                        -> {"ready": true}
    {"faults": TEXT}     set (empty: no more)             -> {"struck": 0}
    {"faults": null}     how many have struck since then  -> {"struck": N}
    what cannot be done, or the TPM cannot begin          -> {"error": [CLASS, WHAT, REMEDY]}

The keeper shuts down its side to have the TPM end, and reads the end of the stream when it has.
"""

from __future__ import annotations

import json
import socket
from typing import Final

from crbd import errors
from crbd.errors import OperatorError

MAX_PACKET: Final = 64 << 10
"""Bytes of a packet at most."""
_MOST: Final = 4000
"""Characters of an error's parts: six bytes each at most in JSON, so that they fit."""


def pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a leash."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def packet(**content: object) -> bytes:
    """A packet. Raises ValueError for one that is too long."""
    data = json.dumps(content).encode()
    if len(data) > MAX_PACKET:
        raise ValueError(f"a packet of {len(data)} bytes is too long: {MAX_PACKET} is the most")
    return data


def content_of(data: bytes) -> dict[str, object]:
    """What stands in a packet; nothing in an empty one."""
    content: dict[str, object] = json.loads(data) if data else {}
    return content


def refusal(error: OperatorError) -> bytes:
    """The packet that says why something cannot be done."""
    return packet(error=[type(error).__name__, error.what[:_MOST], error.remedy[:_MOST]])


def refused(content: dict[str, object]) -> OperatorError | None:
    """The error that stands in a packet, if any."""
    said = content.get("error")
    if not isinstance(said, list):
        return None
    name, what, remedy = map(str, said)
    kind = getattr(errors, name, OperatorError)
    if not (isinstance(kind, type) and issubclass(kind, OperatorError)):
        kind = OperatorError
    return kind(what, remedy)
