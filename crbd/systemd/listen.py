"""sd_listen_fds(3): the descriptors that the service manager passes at the start, sockets and what it kept."""

from __future__ import annotations

import os
from typing import Final

FIRST: Final = 3
"""The number of the first one."""
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_NAMELESS = "unknown"


def passed_descriptors() -> tuple[tuple[str, int], ...]:
    """Their names and numbers; several may have one name. To be asked once: the variables are gone afterwards, so that
    no child and no successor takes them for its own. From now on the descriptors are closed at exec."""
    pid, count, names = (os.environ.pop(variable, "") for variable in _VARIABLES)
    if not (pid.isdecimal() and int(pid) == os.getpid() and count.isdecimal()):
        return ()
    numbers = range(FIRST, FIRST + int(count))
    for number in numbers:
        os.set_inheritable(number, False)
    named = names.split(":") if names else []
    return tuple((named[index] if index < len(named) else _NAMELESS, number) for index, number in enumerate(numbers))
