"""What the service manager hears: that the service is ready, what it does, and that it is alive. docs/systemd.md.

Where nobody listens ($NOTIFY_SOCKET) all of it does nothing. That a message cannot be sent is logged and no reason to
stop serving: the manager does what it thinks right.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable

import trio

from crbd.errors import OperatorError, StateAbsentError, StateAccessError, StateLockedError
from crbd.systemd.notify import notify
from crbd.systemd.watchdog import watchdog_interval

log = logging.getLogger(__name__)

_ERRNO: dict[type[OperatorError], int] = {
    StateAbsentError: errno.ENOENT,
    StateLockedError: errno.EBUSY,
    StateAccessError: errno.EACCES,
}
"""Of errors that no system call stands behind; all others are EINVAL."""


def tell(state: str) -> None:
    """One message, lines of VARIABLE=VALUE."""
    try:
        notify(state)
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state.partition("\n")[0], error)


def tell_ready(doing: str) -> None:
    """Commands are accepted: at the start, and after an upgrade that took place or did not."""
    tell(f"READY=1\nSTATUS={doing}")


def tell_upgrading() -> None:
    """Until `tell_ready`, from this process or the program that it becomes. A manager that asked for it by a signal
    tells old news from new by the time."""
    tell(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}\nSTATUS=becoming the program installed now")


def tell_ending(doing: str) -> None:
    """No command is accepted any more."""
    tell(f"STOPPING=1\nSTATUS={doing}")


def tell_failure(error: OperatorError) -> None:
    """The start failed: the line that the operator gets, and the errno of what the system refused, or one like it."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__
    number = cause.errno if isinstance(cause, OSError) else None
    number = number or _ERRNO.get(type(error), errno.EINVAL)
    tell(f"STATUS={' '.join(str(error).split())}\nERRNO={number}")


async def keep_watchdog(take_a_turn: Callable[[], None]) -> None:
    """Say that the service is alive for as long as the loop runs and `take_a_turn`, in a thread, returns."""
    interval = watchdog_interval()
    if interval is None:
        return
    while True:
        # Nobody waits at the end for a turn that does not come.
        await trio.to_thread.run_sync(take_a_turn, abandon_on_cancel=True)
        tell("WATCHDOG=1")
        await trio.sleep(interval / 3)
