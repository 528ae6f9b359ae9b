"""Where ephemeral TPMs come from: a process that has everything loaded, and forks itself for each.

Theory. A new TPM costs 5 ms, a Python process that can make one 150 ms and more. And libtpms keeps its TPM in process
globals. So one process loads all that a TPM needs, starts nothing (no thread, no event loop, no TPM), and forks itself
for each: that is a TPM of its own, with seeds of its own. It must not be the process of the tests: that one may have
threads, and libraries that do not expect to be forked.

A request is a JSON object {"place": PATH, "library": PATH or null}, sent along with two descriptors: the TPM's leash
and where it says what it has to say. The factory ends when the other end of its socket is closed; the TPMs that it made
live on their leashes.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from crbd.testing.serving import be_a_tpm

MAX_REQUEST = 16 << 10
"""Bytes."""


def main() -> int:
    """Serve requests on the descriptor that is the last argument, until its other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for a TPM: its leash says when it has ended
    gc.freeze()
    with socket.socket(fileno=int(sys.argv[-1])) as requests:
        while True:
            data, descriptors, _, _ = socket.recv_fds(requests, MAX_REQUEST, 2)
            if not data:
                return 0
            if os.fork() == 0:
                requests.close()
                _become(json.loads(data), *descriptors)
            for descriptor in descriptors:
                os.close(descriptor)


def _become(request: dict[str, str], leash: int, output: int) -> NoReturn:
    """The TPM that the request asks for. What goes wrong stands in `output`."""
    status = 1
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        with socket.socket(fileno=leash) as held:
            status = be_a_tpm(Path(request["place"]), held, request["library"])
    finally:
        if error := sys.exception():
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        # Not the way back into the factory's own frames.
        os._exit(status)
