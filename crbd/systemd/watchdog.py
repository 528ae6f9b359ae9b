"""sd_watchdog_enabled(3): whether the service manager wants to hear that the service is alive."""

from __future__ import annotations

import os


def watchdog_interval() -> float | None:
    """Seconds within which it must hear WATCHDOG=1, or None if it does not wait for that."""
    pid, interval = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    if not interval.isdecimal() or int(interval) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(interval) / 1e6
