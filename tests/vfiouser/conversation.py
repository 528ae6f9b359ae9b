"""A connection and a client that talk without a socket."""

from __future__ import annotations

from crbd.vfiouser.connection import Connection, Snapshot
from crbd.vfiouser.messages import Event, Reply

from . import client as c


def opened(said: object = c.QEMU, *, mappable: bool = True, snapshot: Snapshot | None = None) -> Connection:
    """A connection whose client has said its version."""
    connection = Connection(snapshot, mappable=mappable)
    assert isinstance(only_event(connection, c.version(1, said)), Reply)
    return connection


def events(connection: Connection, data: bytes) -> list[Event]:
    """All that `data` causes."""
    connection.receive(data)
    found = []
    while (event := connection.next_event()) is not None:
        found.append(event)
    return found


def only_event(connection: Connection, data: bytes) -> Event:
    (event,) = events(connection, data)
    return event


def answered(connection: Connection, data: bytes) -> c.Answer:
    """The reply to a message that the connection answers itself."""
    event = only_event(connection, data)
    assert isinstance(event, Reply)
    return c.answer(event.data)
