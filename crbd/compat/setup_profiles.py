"""The profile of a new TPM, as swtpm_setup chooses it: options, files by name, the configuration's default."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from crbd.compat.localca_configuration import Configuration
from crbd.compat.setup_options import SetupOptions, descriptor
from crbd.errors import UsageError

DISTRO_DIRECTORY: Final = Path("/usr/share/swtpm/profiles")
MAX_PROFILE: Final = 64 * 1024
"""Bytes of a profile at most."""
MAX_NAME: Final = 32
"""Characters of a profile's name at most (swtpm's figure)."""
_NAME: Final = re.compile(r"[A-Za-z0-9.\-:]+")


def chosen_profile(options: SetupOptions, configuration: Configuration, known: Collection[str]) -> str | None:
    """The JSON of the profile that was asked for, or None. `known` are the names of the library's own profiles: none
    where it has no profiles; the configuration's default then counts for nothing. Raises UsageError.
    """
    text = _asked_for(options, configuration)
    if text is None:
        if not known:
            return None
        if configuration["profile_file"]:
            text = _read_file(Path(configuration["profile_file"]))
        else:
            text = configuration["profile"] or None
    if text is not None:
        _check(text, known)
    return text


def all_profiles(configuration: Configuration, builtin: Collection[str]) -> dict[str, object]:
    """What --print-profiles shows: where profiles are, and their JSON under the names that choose them."""
    found: dict[str, object] = {}
    if configuration["local_profiles_dir"]:
        found["local"] = _in_directory(Path(configuration["local_profiles_dir"]))
    found["distro"] = _in_directory(DISTRO_DIRECTORY)
    found = {place: profiles for place, profiles in found.items() if profiles is not None}
    if builtin:
        found["builtin"] = [{"Name": name} for name in builtin]
    return found


def _asked_for(options: SetupOptions, configuration: Configuration) -> str | None:
    if "profile" in options.values:
        return options["profile"]
    if "profile-name" in options.values:
        return _by_name(options["profile-name"], configuration)
    if "profile-file" in options.values:
        return _read_file(Path(options["profile-file"]))
    if "profile-file-fd" in options.values:
        return _read(descriptor(options, "profile-file-fd"), options["profile-file-fd"])
    return None


def _by_name(name: str, configuration: Configuration) -> str:
    if not _NAME.fullmatch(name):
        raise UsageError(f"Profile name '{name}' contains unacceptable characters.")
    local = configuration["local_profiles_dir"]
    places = {"local": Path(local) if local else None, "distro": DISTRO_DIRECTORY}
    place, colon, rest = name.partition(":")
    if colon and place == "builtin":
        return json.dumps({"Name": rest})
    if colon and place in places:
        wanted, plain = [places[place]], rest
    else:
        wanted, plain = list(places.values()), name
    for directory in wanted:
        if directory is not None and os.access(directory / f"{plain}.json", os.R_OK):
            return _read_file(directory / f"{plain}.json")
    if plain == name:
        return json.dumps({"Name": name})
    raise UsageError(f"Could not find or access profile '{name}'.")


def _read_file(path: Path) -> str:
    try:
        return _read(os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path))
    except OSError as error:
        raise UsageError(f"Could not open profile file '{path}': {error.strerror}") from error


def _read(opened: int, shown: str) -> str:
    try:
        with open(opened, "rb") as file:
            data = file.read(MAX_PROFILE + 1)
    except OSError as error:
        raise UsageError(f"Could not read profile from '{shown}': {error.strerror}") from error
    if len(data) > MAX_PROFILE:
        raise UsageError(f"The profile in '{shown}' has more than {MAX_PROFILE} bytes.")
    return data.decode(errors="replace")


def _check(text: str, known: Collection[str]) -> None:
    name = _name_in(text)
    if not known:
        raise UsageError("This libtpms has no profiles: they need libtpms 0.10.")
    if not name.startswith("custom:") and name not in known:
        raise UsageError(f"swtpm does not support a profile with name '{name}'")


def _name_in(text: str) -> str:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UsageError(f"Could not parse JSON '{text}'.") from error
    name = found.get("Name") if isinstance(found, dict) else None
    if not isinstance(name, str):
        raise UsageError(f"Failed to get 'Name' from profile '{text}'.")
    if len(name) > MAX_NAME:
        raise UsageError(f"Profile name must not exceed {MAX_NAME} characters.")
    return name


def _in_directory(directory: Path) -> list[dict[str, object]] | None:
    try:
        paths = sorted(directory.glob("*.json"))
        if not directory.is_dir():
            return None
    except OSError:
        return None
    profiles = []
    for path in paths:
        try:
            profile = json.loads(path.read_bytes()[:MAX_PROFILE])
        except (OSError, ValueError):
            continue
        if isinstance(profile, dict) and "Name" in profile:
            profiles.append({**profile, "Name": path.stem})
    return profiles
