"""Version negotiation: what a client says of itself, and what we answer.

u16 major, u16 minor, and optionally JSON text, UTF-8 with a NUL at its end:
{"capabilities": {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "write_multiple": true, ...}}
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from crbd.errors import ProtocolError
from crbd.vfiouser.spec import MAJOR, MAX_DESCRIPTORS, MAX_TRANSFER, MAX_VERSION_TEXT, MINOR, VERSION


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What both ends agreed on."""

    takes_descriptors: bool = True
    """Whether the client can be sent a descriptor (`max_msg_fds`; one, where it says nothing)."""
    write_multiple: bool = False
    """Whether it may send REGION_WRITE_MULTI."""


def negotiate_untrusted(body: bytes) -> tuple[Capabilities, bytes]:
    """What is agreed on with a client that sends `body`, and the body of the reply. Raises ProtocolError."""
    if len(body) < VERSION.size:
        raise ProtocolError(f"a version of {len(body)} bytes")
    major, minor = VERSION.unpack_from(body)
    if major != MAJOR:
        raise ProtocolError(f"version {major}.{minor} of the protocol, and this end speaks {MAJOR}.{MINOR}")
    said = _capabilities_untrusted(body[VERSION.size :])
    descriptors = said.get("max_msg_fds", 1)
    agreed = Capabilities(
        takes_descriptors=isinstance(descriptors, int) and descriptors > 0,
        write_multiple=said.get("write_multiple") is True,
    )
    ours: dict[str, object] = {"max_msg_fds": MAX_DESCRIPTORS, "max_data_xfer_size": MAX_TRANSFER}
    if agreed.write_multiple:
        ours["write_multiple"] = True
    text = json.dumps({"capabilities": ours}, separators=(",", ":")).encode()
    return agreed, VERSION.pack(MAJOR, min(minor, MINOR)) + text + b"\0"


def _capabilities_untrusted(text: bytes) -> dict[str, object]:
    """The capabilities in the JSON text, or none where there is no text. Raises ProtocolError."""
    if not text:
        return {}
    if len(text) > MAX_VERSION_TEXT or not text.endswith(b"\0"):
        raise ProtocolError("the text of the version is too long, or has no end")
    try:
        said = json.loads(text[:-1].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ProtocolError("the text of the version is no JSON") from error
    found = said.get("capabilities", {}) if isinstance(said, dict) else None
    if not isinstance(found, dict):
        raise ProtocolError("the text of the version has no capabilities")
    return found
