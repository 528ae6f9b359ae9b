"""Feeding a ControlConnection and fetching what comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from crbd.control import messages as m
from crbd.control.connection import ControlConnection, Event, Received


def events_of(connection: ControlConnection) -> list[Event]:
    """All events that can be fetched now."""
    events: list[Event] = []
    while (event := connection.next_event()) is not None:
        events.append(event)
    return events


def feed(connection: ControlConnection, pieces: Iterable[tuple[bytes, Sequence[int]]]) -> list[Event]:
    """The events of reads that bring these bytes and descriptors, fetched after each read as a server does."""
    events: list[Event] = []
    for data, fds in pieces:
        connection.receive(data, fds)
        events += events_of(connection)
    return events


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """`data` cut at these places; places out of range and at the ends cut nothing off."""
    ends = [*sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends, strict=False) if start < end]


def single(data: bytes, fds: Sequence[int] = ()) -> list[tuple[bytes, Sequence[int]]]:
    """Byte by byte; the descriptors come with the first one, as the kernel delivers them."""
    return [(data[index : index + 1], fds if index == 0 else ()) for index in range(len(data))]


def descriptors_in(events: Iterable[Event]) -> list[int]:
    """The descriptors that these events carry."""
    return [
        event.request.fd for event in events if isinstance(event, Received) and isinstance(event.request, m.SetDataFd)
    ]
