"""The firmware's measurement log, parsed and replayed.

Source: TCG PC Client Platform Firmware Profile, "Event Logging": the crypto agile log. Little-endian. Its first entry
is in the older form with one SHA-1 digest and describes the others: which digests each has, and how long they are.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

EV_NO_ACTION = 3
"""An entry that tells something and was not extended into its PCR."""
_SPEC_ID = b"Spec ID Event03\0"
_STARTUP_LOCALITY = b"StartupLocality\0"
_ALGORITHMS = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
"""TPM_ALG_ID to hashlib's (and tpm2-tools') name."""
_PCRS = 24

Banks = dict[str, dict[int, bytes]]
"""PCR values by the bank's hash algorithm and the PCR's number."""


class EventLogError(ValueError):
    """The log is not what the specification says."""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry: `digests` by algorithm, as extended into PCR `pcr`; `data` is what `kind` says it is."""

    pcr: int
    kind: int
    digests: dict[str, bytes]
    data: bytes


class _Reader:
    """Takes little-endian fields off the front of a log."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def ended(self) -> bool:
        return self._at == len(self._data)

    def take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise EventLogError(f"cut short: {length} bytes wanted at {self._at} of {len(self._data)}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def number(self, length: int) -> int:
        return int.from_bytes(self.take(length), "little")


def _digest_sizes(specification: bytes) -> dict[int, int]:
    """TCG_EfiSpecIDEvent: the digest sizes in bytes by TPM_ALG_ID."""
    reader = _Reader(specification)
    if reader.take(16) != _SPEC_ID:
        raise EventLogError("the first entry is no Spec ID event of version 03")
    # Platform class (4 bytes), minor and major version, errata, size of a UINTN.
    reader.take(8)
    return {reader.number(2): reader.number(2) for _ in range(reader.number(4))}


def parse(log: bytes) -> list[Event]:
    """The entries after the first, which is checked. Raises EventLogError."""
    reader = _Reader(log)
    pcr, kind, _digest = reader.number(4), reader.number(4), reader.take(20)
    if (pcr, kind) != (0, EV_NO_ACTION):
        raise EventLogError(f"the first entry is of type {kind:#x} for PCR {pcr}")
    sizes = _digest_sizes(reader.take(reader.number(4)))
    events = []
    while not reader.ended:
        events.append(_event(reader, sizes))
    return events


def _event(reader: _Reader, sizes: dict[int, int]) -> Event:
    """TCG_PCR_EVENT2."""
    pcr, kind = reader.number(4), reader.number(4)
    digests = {}
    for _ in range(reader.number(4)):
        algorithm = reader.number(2)
        if algorithm not in sizes:
            raise EventLogError(f"a digest of algorithm {algorithm:#x}, which the first entry does not name")
        digests[_ALGORITHMS.get(algorithm, hex(algorithm))] = reader.take(sizes[algorithm])
    return Event(pcr, kind, digests, reader.take(reader.number(4)))


def replay(events: list[Event]) -> Banks:
    """The value of every PCR that the log mentions, had nothing else been extended after start-up."""
    banks: Banks = {}
    locality = 0
    for event in events:
        if event.kind == EV_NO_ACTION:
            if event.data.startswith(_STARTUP_LOCALITY):
                locality = event.data[len(_STARTUP_LOCALITY)]
            continue
        if event.pcr >= _PCRS:
            raise EventLogError(f"an event for PCR {event.pcr}")
        for name, digest in event.digests.items():
            start = bytes(len(digest) - 1) + bytes([locality if event.pcr == 0 else 0])
            value = banks.setdefault(name, {}).get(event.pcr, start)
            banks[name][event.pcr] = hashlib.new(name, value + digest).digest()
    return banks


def parse_pcrread(text: str) -> Banks:
    """What tpm2_pcrread printed, values only of the banks that have any."""
    banks: Banks = {}
    bank: dict[int, bytes] = {}
    for line in text.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in _ALGORITHMS.values():
            bank = banks.setdefault(name, {})
        elif name.isdecimal():
            bank[int(name)] = bytes.fromhex(value.removeprefix("0x"))
    return {name: values for name, values in banks.items() if values}
