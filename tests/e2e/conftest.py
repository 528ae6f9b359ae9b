"""What the end-to-end tests share: the guest's image."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .qemu import GuestImage

_CHECKOUT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="session")
def image() -> GuestImage:
    """The test guest, made (or found) by scripts/guest-image."""
    command = [sys.executable, str(_CHECKOUT / "scripts" / "guest-image")]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, f"scripts/guest-image failed:\n{done.stderr}"
    paths = dict(line.split("=", 1) for line in done.stdout.splitlines())
    return GuestImage(Path(paths["kernel"]), Path(paths["initrd"]))
