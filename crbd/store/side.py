"""The file beside swtpm's that holds registers and session: `crbd.registers`, or `FILE.registers` beside a linear file.

swtpm does not know it. Bytes and theory: crbd.state.side.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from crbd.errors import StateError, StateForeignError
from crbd.state.side import Records, SideState, decode_side, digest_of, encode_side
from crbd.state.swtpm import MAX_BLOB, decode_file, encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.files import sync_directory, write_durably

log = logging.getLogger(__name__)

NAME = "crbd.registers"


class SideFile:
    """One such file (mode 0600), encrypted where there is a key. Whoever writes holds the lock of the state."""

    def __init__(self, path: Path, key: SwtpmKey | None) -> None:
        self._path = path
        self._key = key

    def load(self, volatile: bytes | None) -> SideState | None:
        """What belongs to the engine's volatile state, if anything does. What cannot be used is logged."""
        try:
            records = self._read()
        except FileNotFoundError:
            return None
        except (OSError, StateError) as error:
            log.warning("%s is left aside, and the TPM starts with registers as after a reset: %s", self._path, error)
            return None
        if volatile is None:
            return None
        found = records.get(digest_of(volatile))
        if found is None:
            log.warning(
                "%s is left aside, and the TPM starts with registers as after a reset: another program has written the "
                "volatile state beside it",
                self._path,
            )
        return found

    def prepare(self, before: bytes | None, after: bytes, side: SideState) -> None:
        """Keep `side` for the volatile state `after`, which is written next; what belongs to `before` stays, durably.

        Raises OSError.
        """
        kept: Records = {}
        if before is not None and before != after:
            with contextlib.suppress(OSError, StateError):
                kept = {digest: old for digest, old in self._read().items() if digest == digest_of(before)}
        write_durably(self._path, encode_file(encode_side({digest_of(after): side} | kept), self._key))

    def remove(self) -> None:
        """Durably; no error where there is none. Raises OSError."""
        try:
            self._path.unlink()
        except FileNotFoundError:
            return
        sync_directory(self._path.parent)

    def _read(self) -> Records:
        """Raises OSError, StateError."""
        # Without O_NONBLOCK a FIFO would hold the start up for ever.
        descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            blob = file.read(MAX_BLOB + 1)
        if blob is None:
            raise StateForeignError(f"{self._path} is no file", "remove it")
        return decode_side(decode_file(blob, str(self._path), self._key), str(self._path))
