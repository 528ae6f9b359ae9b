"""A trace of accesses to a tpm-crb device and of what came of them; its form as JSON is described in vectors/README.md.

Offsets are bytes from the base of locality 0's page. A `value` is the bytes of the access in ascending order of
address, so that a 32-bit register's value reads little-endian; its length is the width of the access.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Write:
    """A write. `cancel`: the device asked the TPM to cancel, before the access was over."""

    offset: int
    value: bytes
    cancel: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """A read, and what it returned."""

    offset: int
    value: bytes


@dataclass(frozen=True, slots=True)
class Completed:
    """The TPM answered `response`, and START was clear afterwards.

    `command` is what the device had sent to the TPM; None where nobody watched that.
    """

    response: bytes
    command: bytes | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The TPM broke for good: the command in execution failed, and START was clear afterwards."""


@dataclass(frozen=True, slots=True)
class Reset:
    """A system reset; as the first step, power-on."""


@dataclass(frozen=True, slots=True)
class Established:
    """From now on the TPM's tpmEstablished flag is `value`."""

    value: bool


Step = Write | Read | Completed | Failed | Reset | Established


@dataclass(frozen=True, slots=True)
class Config:
    """What the trace was taken from."""

    device: str
    """`qemu-7.2`, or `qemu-11` for QEMU 11.1 and later (chunked transfers)."""
    buffer_size: int
    """The TPM's largest buffer in bytes, which QEMU 11.1 makes its own; QEMU 7.2 never goes above 0xF80."""
    chunks: bool
    """Whether chunked transfers are on: QEMU 11.1's property cap-chunk, off for machine types before 11.1."""
    machine: str
    """QEMU's machine type."""
    scripted: bool
    """Whether the TPM was the scripted one: then commands and cancels were watched, and nothing depends on the run."""


@dataclass(frozen=True, slots=True)
class Trace:
    """One vector file. `provenance` is for people."""

    provenance: dict[str, str]
    config: Config
    steps: tuple[Step, ...]


def load(path: Path) -> Trace:
    """The trace in a file. Raises ValueError or KeyError for one that is none."""
    document = json.loads(path.read_text(encoding="ascii"))
    steps = tuple(_decode(step) for step in document["steps"])
    return Trace(document["provenance"], Config(**document["config"]), steps)


def dump(trace: Trace) -> str:
    """The file's text: one step a line, so that two traces can be compared by line."""
    config = {name: getattr(trace.config, name) for name in Config.__slots__}
    steps = ",\n".join(json.dumps(_encode(step)) for step in trace.steps)
    head = json.dumps({"provenance": trace.provenance, "config": config}, indent=1)
    return f'{head[:-2]},\n "steps": [\n{steps}\n ]\n}}\n'


def _encode(step: Step) -> dict[str, Any]:
    match step:
        case Write(offset, value, cancel):
            return {"op": "write", "offset": offset, "value": value.hex()} | ({"cancel": True} if cancel else {})
        case Read(offset, value):
            return {"op": "read", "offset": offset, "value": value.hex()}
        case Completed(response, command):
            watched = {} if command is None else {"command": command.hex()}
            return {"op": "completed", "response": response.hex()} | watched
        case Failed():
            return {"op": "failed"}
        case Reset():
            return {"op": "reset"}
        case Established(flag):
            return {"op": "established", "value": flag}


def _decode(step: dict[str, Any]) -> Step:
    match step["op"]:
        case "write":
            return Write(step["offset"], bytes.fromhex(step["value"]), step.get("cancel", False))
        case "read":
            return Read(step["offset"], bytes.fromhex(step["value"]))
        case "completed":
            command = step.get("command")
            return Completed(bytes.fromhex(step["response"]), None if command is None else bytes.fromhex(command))
        case "failed":
            return Failed()
        case "reset":
            return Reset()
        case "established":
            return Established(step["value"])
        case unknown:
            raise ValueError(f"{unknown!r} is no step of a trace")
