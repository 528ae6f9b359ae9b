"""How thoroughly properties are tried: HYPOTHESIS_PROFILE=nightly takes its time (docs/testing.md)."""

from __future__ import annotations

import os
import sys

from hypothesis import settings

# What the launchers of a checkout that is not installed run on.
os.environ.setdefault("CRBD_PYTHON", sys.executable)

settings.register_profile("quick", max_examples=200, deadline=None)
settings.register_profile("nightly", max_examples=50_000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
