"""How thoroughly properties are tried: HYPOTHESIS_PROFILE=nightly takes its time (docs/testing.md)."""

from __future__ import annotations

import os
import signal
import sys

from hypothesis import settings

# What the launchers of a checkout that is not installed run on.
os.environ.setdefault("CRBD_PYTHON", sys.executable)

# A background job of a shell ignores SIGINT, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("quick", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=50_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
