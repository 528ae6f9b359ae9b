"""Where keys come from: the value of `--key` and `--passphrase`, and the bytes it stands for.

    file:PATH          the whole file
    fd:NUMBER          an open descriptor, read to its end and closed
    credential:NAME    a systemd credential ($CREDENTIALS_DIRECTORY/NAME)
    exec:PROGRAM       what the program prints (a hook for a key service); it is run without a shell and without
    arguments

A key is 32 bytes as they are, or 64 hexadecimal digits with white space around them. A passphrase loses one newline
at its end. Nothing of either is ever in an argument list, in the log or in an error.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from crbd.errors import UsageError
from crbd.state.keys import Passphrase, RawKey

MAX_SIZE = 4096
"""Bytes of a key or passphrase at most."""
HOOK_TIMEOUT = 60.0
"""Seconds that a key program may take."""
_FORMS = "use file:PATH, fd:NUMBER, credential:NAME or exec:PROGRAM"


def read_key(source: str, option: str = "--key") -> RawKey:
    """The key that `option` names. Raises UsageError."""
    found = _read(source, option)
    try:
        text = bytes(found).strip()
        if len(found) != 32 and len(text) == 64:
            return RawKey(bytearray.fromhex(text.decode("ascii")))
        return RawKey(found)
    except ValueError as error:
        raise UsageError(
            f"{option} {source}: 64 characters, and not all are hexadecimal digits", "see --help"
        ) from error
    finally:
        _wipe(found)


def read_passphrase(source: str, option: str = "--passphrase") -> Passphrase:
    """The passphrase that `option` names. Raises UsageError."""
    found = _read(source, option)
    try:
        return Passphrase(found.removesuffix(b"\n"))
    finally:
        _wipe(found)


def _read(source: str, option: str) -> bytearray:
    kind, _, rest = source.partition(":")
    if not rest:
        raise UsageError(f"{option} {source!r} says not where from", _FORMS)
    try:
        found = _take(kind, rest, f"{option} {source}")
    except OSError as error:
        raise UsageError(f"{option} {source}: {error.strerror}", "name one that this user may read") from error
    if len(found) > MAX_SIZE:
        _wipe(found)
        raise UsageError(f"{option} {source}: more than {MAX_SIZE} bytes", "that is no key")
    return found


def _take(kind: str, rest: str, shown: str) -> bytearray:
    match kind:
        case "file":
            return _read_file(Path(rest))
        case "fd" if rest.isdecimal():
            return _read_descriptor(int(rest))
        case "credential":
            directory = os.environ.get("CREDENTIALS_DIRECTORY")
            if not directory or "/" in rest:
                raise UsageError(f"{shown}: there is no such credential", "LoadCredential= in the unit passes one")
            return _read_file(Path(directory, rest))
        case "exec":
            return _run(rest, shown)
    raise UsageError(f"{shown} says not where from", _FORMS)


def _read_file(path: Path) -> bytearray:
    return _read_descriptor(os.open(path, os.O_RDONLY | os.O_CLOEXEC))


def _read_descriptor(descriptor: int) -> bytearray:
    found = bytearray()
    try:
        while len(found) <= MAX_SIZE and (piece := os.read(descriptor, MAX_SIZE)):
            found += piece
    finally:
        os.close(descriptor)
    return found


def _run(program: str, shown: str) -> bytearray:
    try:
        done = subprocess.run([program], check=False, stdout=subprocess.PIPE, timeout=HOOK_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise UsageError(f"{shown}: no key within {HOOK_TIMEOUT:.0f} s", "see what the program waits for") from error
    if done.returncode:
        raise UsageError(f"{shown}: ended with status {done.returncode}", "see what the program says")
    return bytearray(done.stdout)


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
