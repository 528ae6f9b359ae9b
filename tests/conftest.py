"""How thoroughly properties are tried: HYPOTHESIS_PROFILE=nightly takes its time (docs/testing.md)."""

from __future__ import annotations

import os
import signal
import sys

from hypothesis import settings

# What the launchers of a checkout that is not installed run on.
os.environ.setdefault("CRBD_PYTHON", sys.executable)

# A background job of a shell ignores SIGINT, nohup's SIGHUP, and so would all that the tests start.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

settings.register_profile("quick", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=50_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
