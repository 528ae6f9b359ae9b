"""The configuration files of swtpm_setup and swtpm_localca: `NAME = VALUE` lines, and files of options.

Sources: swtpm_setup.conf(5), swtpm-localca.conf(5), swtpm-localca.options(5).
"""

from __future__ import annotations

import getpass
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from crbd.errors import UsageError

SETUP_FILE: Final = "swtpm_setup.conf"
LOCALCA_FILE: Final = "swtpm-localca.conf"
OPTIONS_FILE: Final = "swtpm-localca.options"
SYSTEM_DIRECTORY: Final = Path("/etc")
MAX_SIZE: Final = 1 << 20
"""Bytes of a configuration file at most."""
_LINE: Final = re.compile(r"([A-Za-z0-9_]+)\s*=\s*([^#]*)")
_ENVIRONMENT_LINE: Final = re.compile(r"env:([A-Za-z_][A-Za-z_0-9]*)\s*=\s*(.*)")
_VARIABLE: Final = re.compile(r"\$\{([^}]*)\}")


class Configuration:
    """A file of `NAME = VALUE` lines; `#` begins a comment, `${NAME}` stands for an environment variable.

    Of a name that is there twice the first counts.
    """

    def __init__(self, text: str, environment: Mapping[str, str] | None = None) -> None:
        environment = os.environ if environment is None else environment
        self._values: dict[str, str] = {}
        self.environment: dict[str, str] = {}
        """What `env:NAME = VALUE` lines set for PKCS#11 modules."""
        for line in text.splitlines():
            if found := _LINE.match(line):
                name, value = found[1], found[2].rstrip()
                self._values.setdefault(name, _VARIABLE.sub(lambda match: environment.get(match[1], ""), value))
            elif found := _ENVIRONMENT_LINE.match(line):
                self.environment[found[1]] = found[2]

    def __getitem__(self, name: str) -> str:
        """The value, empty where there is none."""
        return self._values.get(name, "")


def user_directory() -> Path:
    """Where this user's configuration is: XDG_CONFIG_HOME, or .config in the home directory."""
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    if configured:
        return Path(configured)
    return Path("~/.config").expanduser()


def default_file(name: str) -> Path:
    """The user's own file of that name if it can be read, else the system's, which need not exist."""
    own = user_directory() / name
    return own if os.access(own, os.R_OK) else SYSTEM_DIRECTORY / name


def read_configuration(path: Path, what: str) -> Configuration:
    """Raises UsageError."""
    return Configuration(_read(path, what))


def read_options(path: Path, what: str) -> list[str]:
    """The words of a file of options, which has no quotes. Raises UsageError."""
    return _read(path, what).split()


def user_name() -> str:
    """Who runs this, for messages."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _read(path: Path, what: str) -> str:
    try:
        with path.open("rb") as file:
            return file.read(MAX_SIZE).decode(errors="surrogateescape")
    except OSError as error:
        raise UsageError(f"Need read rights on {what} {path} for user {user_name()}: {error.strerror}.") from error
