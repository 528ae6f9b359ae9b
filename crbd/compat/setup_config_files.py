"""`swtpm_setup --create-config-files`: configuration of swtpm_setup and swtpm_localca for one user."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Final

from crbd.compat.localca_configuration import (
    LOCALCA_FILE,
    OPTIONS_FILE,
    SETUP_FILE,
    SYSTEM_DIRECTORY,
    user_directory,
)
from crbd.errors import AuthorityError, UsageError

DEFAULT_BANKS: Final = "sha256"
_SETUP: Final = """create_certs_tool = {tool}
create_certs_tool_config = {configuration}
create_certs_tool_options = {options}
# Comma-separated list (no spaces) of PCR banks to activate by default
active_pcr_banks = {banks}
# profile = {{"Name": "default-v1"}}
# profile_file =
local_profiles_dir = {directory}/etc/swtpm/profiles/
"""
_LOCALCA: Final = """statedir = {directory}
signingkey = {directory}/signkey.pem
issuercert = {directory}/issuercert.pem
certserial = {directory}/certserial
"""
_OPTIONS: Final = """--platform-manufacturer {manufacturer}
--platform-version {version}
--platform-model {model}
"""


def create_config_files(words: Collection[str], tool: str) -> None:
    """Write the three files; `tool` is the swtpm_localca they name. Prints what is written.

    Raises UsageError where a file is there already, and for root unless the word `root` was given; AuthorityError where
    a file cannot be written.
    """
    if "overwrite" in words and "skip-if-exist" in words:
        raise UsageError("Error: overwrite and skip-if-exist cannot both be used")
    if os.getuid() == 0 and "root" not in words:
        raise UsageError(
            f"Requiring the 'root' flag since the configuration files will shadow those in {SYSTEM_DIRECTORY}."
        )
    files = _contents(tool)
    if "overwrite" not in words:
        for path in files:
            if os.path.lexists(path):
                if "skip-if-exist" in words:
                    return
                raise UsageError(f"File {path} already exists. Refusing to overwrite.")
    authority = user_directory() / "var" / "lib" / "swtpm-localca"
    written: list[Path] = []
    try:
        authority.mkdir(mode=0o775, parents=True, exist_ok=True)
        for path, text in files.items():
            print(f"Writing {path}.", file=sys.stdout)
            temporary = path.with_name(f".{path.name}.new")
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink(missing_ok=True)
        raise AuthorityError(f"Could not write to {error.filename}: {error.strerror}") from error


def _contents(tool: str) -> dict[Path, str]:
    directory, system = user_directory(), os.uname()
    configuration, options = directory / LOCALCA_FILE, directory / OPTIONS_FILE
    setup = _SETUP.format(
        tool=tool, configuration=configuration, options=options, banks=DEFAULT_BANKS, directory=directory
    )
    platform = _OPTIONS.format(
        manufacturer=_word(system.sysname), version=_word(system.version), model=_word(system.sysname)
    )
    localca = _LOCALCA.format(directory=directory / "var" / "lib" / "swtpm-localca")
    return {directory / SETUP_FILE: setup, configuration: localca, options: platform}


def _word(text: str) -> str:
    return text.replace(" ", "_")
