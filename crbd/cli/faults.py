"""`--faults`: what is to go wrong, from the command line or a file, put around engine and store."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

from crbd.engine.port import Engine, StatePort
from crbd.errors import UsageError
from crbd.service.faults import FaultPlan, parse_faults
from crbd.service.injection import FaultyEngine

log = logging.getLogger(__name__)

MAX_SIZE = 10 << 10
"""Bytes of a file of faults at most."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Declare `--faults`."""
    parser.add_argument(
        "--faults",
        metavar="FAULTS",
        help="for tests of TPM software: make commands fail, as in PCR_Extend:2=retry, or as the file FAULTS says "
        "(docs/ci.md)",
    )


def read_faults(text: str) -> str:
    """The faults themselves: what is given, where it has a `=`, else what stands in that file. Raises UsageError."""
    if "=" in text:
        return text
    try:
        with Path(text).open("rb") as file:
            data = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise UsageError(f"--faults {text}: {error.strerror}", "name a file, or write COMMAND:N=ACTION") from error
    try:
        if len(data) <= MAX_SIZE:
            return data.decode()
    except UnicodeDecodeError:
        pass
    raise UsageError(f"--faults {text} is no text", f"name a file of at most {MAX_SIZE} bytes, in UTF-8")


def checked(text: str) -> str:
    """The faults that the value of `--faults` asks for, as a text without errors in it. Raises UsageError."""
    faults = read_faults(text)
    parse_faults(faults, _source(text))
    return faults


class Planned:
    """What the value of `--faults` asks for, from the moment that clients are served: a start is not to fail by it."""

    def __init__(self, text: str) -> None:
        """Say in the log what this TPM does. Raises UsageError."""
        self._faults = parse_faults(read_faults(text), _source(text))
        self.plan = FaultPlan()
        log.warning("%s: this TPM fails on purpose, in %d ways", _source(text), len(self._faults))

    def begin(self) -> None:
        """Count from now on."""
        self.plan.replace(self._faults)

    def failing(self, make_engine: Callable[[StatePort], Engine]) -> Callable[[StatePort], Engine]:
        """`make_engine` for engines that fail as planned."""

        def make(port: StatePort) -> Engine:
            return FaultyEngine(make_engine(port), port, self.plan)

        return make


def _source(text: str) -> str:
    return "--faults" if "=" in text else text
