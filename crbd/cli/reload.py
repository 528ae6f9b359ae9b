"""`crbd reload`: upgrade a running daemon without its clients noticing."""

from __future__ import annotations

import argparse

from crbd.cli.control_client import ask, unknown_to
from crbd.control.messages import Outcome, Upgrade
from crbd.errors import NotUpgradedError
from crbd.server.endpoint import parse_endpoint

DESCRIPTION = """Put the crbd that is installed now in the place of a running one. The process keeps its id, its
connections, its sockets and its lock; guest and VMM notice a pause of some tenths of a second. The new program is tried
on a copy of the TPM first; where it cannot go on, the running one does, and this command says why. `kill -HUP` does
the same and says it in the log."""
PATIENCE = 120.0
"""Seconds: a trial, and a command under way that is waited for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `crbd reload`."""
    parser.add_argument(
        "--ctrl", metavar="ENDPOINT", required=True, help="the daemon's control socket: unix:PATH or tcp:HOST:PORT"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ask for it, print what came of it, return 0. Raises OperatorError."""
    endpoint = parse_endpoint(arguments.ctrl, "--ctrl")
    reply = ask(endpoint, Upgrade(), PATIENCE)
    if not isinstance(reply, Outcome):
        raise unknown_to(endpoint, "UPGRADE", reply)
    text = " ".join(reply.text.decode("utf-8", "replace").split())
    if not reply.done:
        raise NotUpgradedError(text, "mend that and ask again; the daemon goes on as before")
    print(text)
    return 0
