"""What the operations of `crbd state` have in common: their keys, and how they say things."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from crbd.cli.keys import read_key, read_passphrase
from crbd.cli.swtpm_key import read_swtpm_key
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.judgement import MakeEngine
from crbd.state.keys import UserKey
from crbd.state.swtpm_sealing import SwtpmKey

_FORMS = "file:PATH, fd:N, credential:NAME or exec:PROGRAM"


def add_directory(parser: argparse.ArgumentParser, name: str = "directory", metavar: str = "DIR") -> None:
    """The positional argument that names a state directory."""
    parser.add_argument(name, metavar=metavar, type=Path, help="directory that holds the TPM's state")


def add_keys(parser: argparse.ArgumentParser) -> None:
    """`--key` and `--passphrase`: they open what is there."""
    parser.add_argument("--key", metavar="SOURCE", help=f"key that opens the state: {_FORMS}")
    parser.add_argument("--passphrase", metavar="SOURCE", help="passphrase that opens the state, from the same sources")


def add_new_keys(parser: argparse.ArgumentParser) -> None:
    """`--new-key` and `--new-passphrase`: they will open what is written."""
    parser.add_argument("--new-key", metavar="SOURCE", help=f"key that is to open what is written: {_FORMS}")
    parser.add_argument("--new-passphrase", metavar="SOURCE", help="passphrase that is to open what is written")


def add_swtpm_key(parser: argparse.ArgumentParser) -> None:
    """`--swtpm-key`, as `crbd serve` has it."""
    parser.add_argument(
        "--swtpm-key",
        metavar="KEY",
        help="key of state in swtpm's layouts, as swtpm's --key has it: file=PATH[,mode=...], pwdfile=PATH, ...",
    )


@contextmanager
def swtpm_key_of(arguments: argparse.Namespace) -> Iterator[SwtpmKey | None]:
    """The key that `add_swtpm_key` declared, wiped at the end. Raises UsageError."""
    if arguments.swtpm_key is None:
        yield None
        return
    key = read_swtpm_key(arguments.swtpm_key, "--swtpm-key")
    try:
        yield key
    finally:
        key.wipe()


def add_library(parser: argparse.ArgumentParser) -> None:
    """`--libtpms`, as `crbd serve` has it."""
    parser.add_argument(
        "--libtpms", metavar="FILE", help="the libtpms library to load (default: libtpms.so.0 of the system)"
    )


@contextmanager
def keys_of(arguments: argparse.Namespace) -> Iterator[tuple[UserKey, ...]]:
    """The keys that `add_keys` declared, wiped at the end. Raises UsageError."""
    with _read(arguments.key, arguments.passphrase, "") as keys:
        yield keys


@contextmanager
def new_keys_of(arguments: argparse.Namespace) -> Iterator[tuple[UserKey, ...]]:
    """The keys that `add_new_keys` declared, wiped at the end. Raises UsageError."""
    with _read(arguments.new_key, arguments.new_passphrase, "new-") as keys:
        yield keys


@contextmanager
def _read(key: str | None, passphrase: str | None, which: str) -> Iterator[tuple[UserKey, ...]]:
    keys: list[UserKey] = []
    try:
        if key is not None:
            keys.append(read_key(key, f"--{which}key"))
        if passphrase is not None:
            keys.append(read_passphrase(passphrase, f"--{which}passphrase"))
        yield tuple(keys)
    finally:
        for each in keys:
            each.wipe()


def engine_maker(arguments: argparse.Namespace) -> MakeEngine:
    """Makes the engine that `--libtpms` names."""
    return partial(_make_engine, library=arguments.libtpms)


def _make_engine(port: StatePort, library: str | None) -> Engine:
    return LibtpmsEngine(port, library)
