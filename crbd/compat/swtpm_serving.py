"""The part of the swtpm command that needs trio, apart: importing it takes as long as everything before it together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import trio

from crbd.server.daemon import serve_in
from crbd.server.premises import Premises
from crbd.server.succession import Program


def serve_until_the_end(
    premises: Premises, program: Program | None, ready: Callable[[], None], wall_in: Callable[[], None]
) -> None:
    """Serve what is open. Raises OperatorError where `wall_in` does."""
    trio.run(partial(serve_in, premises, program=program, ready=ready, wall_in=wall_in))
