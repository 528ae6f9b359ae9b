"""Clients that were stopped, with their sockets, which belong to whoever holds the list."""

from __future__ import annotations

import socket

from crbd.state.handover import Link

Links = list[tuple[Link, socket.socket]]
