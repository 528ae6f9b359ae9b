"""The floor of a daemon in Python: answers every read with the same bytes (poll, recv, send; nothing else).

One argument: path of the UNIX stream socket to listen on.
"""

from __future__ import annotations

import select
import socket
import sys


def serve(client: socket.socket) -> None:
    """Echo until the peer closes."""
    poll = select.poll()
    poll.register(client, select.POLLIN)
    while True:
        poll.poll()
        data = client.recv(4096)
        if not data:
            return
        client.send(data)


def main() -> None:
    """Serve one client after the other until killed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(sys.argv[1])
        listener.listen(1)
        while True:
            client, _ = listener.accept()
            with client:
                serve(client)


if __name__ == "__main__":
    main()
