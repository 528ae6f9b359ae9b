"""Where swtpm_setup and swtpm_localca say what they do: a log file, or else standard output and standard error."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass

from crbd.errors import UsageError


@dataclass(frozen=True, slots=True)
class Log:
    """`path` is empty where there is no log file. Every line is appended on its own: other programs write there too."""

    path: str = ""

    @classmethod
    def open(cls, path: str) -> Log:
        """Make the log file (0640) if need be. Raises UsageError."""
        log = cls(path)
        if path:
            log._append("")
        return log

    def say(self, text: str) -> None:
        """A line about what is done."""
        self._put(text, error=False)

    def complain(self, text: str) -> None:
        """A line about what went wrong."""
        self._put(text, error=True)

    def _put(self, text: str, *, error: bool) -> None:
        if self.path:
            self._append(f"{text}\n")
        else:
            print(text, file=sys.stderr if error else sys.stdout, flush=True)

    def _append(self, text: str) -> None:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self.path, flags, 0o640)
            try:
                os.write(descriptor, text.encode(errors="surrogateescape"))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UsageError(f"Cannot open logfile {self.path}: {error.strerror}") from error
