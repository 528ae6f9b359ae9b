"""A daemon's start imports what it needs and nothing heavy (see `python -X importtime -m crbd serve --help`)."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("cryptography", "tpm2_pytss", "cffi", "rich", "prometheus_client", "hypothesis", "pytest", "asyncio")


def test_the_serving_path_is_light() -> None:
    probe = f"import sys, crbd.cli.main, crbd.cli.serve; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", probe], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
