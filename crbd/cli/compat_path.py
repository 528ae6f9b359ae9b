"""`crbd compat-path`: the directory that takes swtpm's place when it stands first in PATH."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from crbd.errors import OperatorError

DESCRIPTION = """Print the directory that holds crbd's swtpm, swtpm_ioctl, swtpm_bios, swtpm_setup, swtpm_localca and
swtpm_cert. Put it first in PATH, and programs that run swtpm run crbd instead."""

_LAUNCHER = "libexec/crbd/swtpm"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`crbd compat-path` takes none."""


def run(_: argparse.Namespace) -> int:
    """Print it; returns 0. Raises OperatorError where crbd was not installed."""
    print(find_directory())
    return 0


def find_directory() -> Path:
    """Where the launchers were installed, or lie in the checkout that this is. Raises OperatorError."""
    candidates = [Path(__file__).parents[2] / _LAUNCHER]
    try:
        recorded = files("crbd") or []
    except PackageNotFoundError:
        recorded = []
    candidates[:0] = [Path(str(file.locate())) for file in recorded if file.as_posix().endswith(_LAUNCHER)]
    for launcher in candidates:
        if launcher.is_file():
            return launcher.parent.resolve()
    raise OperatorError("the commands in swtpm's place are not installed", "install crbd: pip install .")
