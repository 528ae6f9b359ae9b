"""Releases of crbd, each installed by pip in a place of its own, and `current`, a link that says which one counts.

That is how operators who must be able to go back install things: `current/bin/crbd` is what runs and what an upgrade
executes again.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

_CHECKOUT = Path(__file__).resolve().parents[2]
HANDOVERS = {1: ("892d404", "0.0.9")}
"""By version of the handover's format: the first commit that wrote it, and the version that its wheel is given. A line
stays for as long as a release that could have written it may still be running somewhere."""
PRESENT = "0.1.1"
"""The version given to the checkout's own wheel."""


class Releases:
    """What is installed below `place`."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self.program = place / "current" / "bin" / "crbd"

    def install(self, name: str, wheel: Path) -> None:
        """Install it; the libraries that it needs are those of the present interpreter."""
        root = self._place / name
        venv.create(root, symlinks=True)
        packages = next((root / "lib").glob("python*/site-packages"))
        (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
        pip = [sys.executable, "-m", "pip", "--python", str(root / "bin" / "python"), "install", "--quiet"]
        subprocess.run([*pip, "--no-deps", "--no-index", "--no-warn-script-location", str(wheel)], check=True)

    def choose(self, name: str) -> None:
        """Let `current` be that one, from one moment to the next."""
        link = self._place / "current.new"
        link.symlink_to(name)
        link.rename(self._place / "current")


def wheel_of(commit: str, version: str) -> Path:
    """The wheel of a commit, or of the checkout as it is ("HEAD")."""
    command = [sys.executable, str(_CHECKOUT / "scripts" / "release-wheel"), commit, version]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())
