"""`--profile` of the swtpm command: the JSON text for libtpms (swtpm 0.11: common.c)."""

from __future__ import annotations

import json
import os

from crbd.compat.swtpm_grammar import Values
from crbd.errors import UsageError

MAX_SIZE = 10 * 1024
"""Bytes of a profile at most (swtpm's limit for one behind a descriptor)."""


def profile_of(values: Values) -> str:
    """The profile, without white space around it. Raises UsageError."""
    if values.string("remove-disabled") is not None:
        raise UsageError("--profile: remove-disabled is not supported", "choose the algorithms in the profile")
    given = [name for name in ("profile", "name", "file", "fd") if name in values]
    if len(given) > 1:
        raise UsageError("Only one profile option parameter of 'profile', 'name', 'fd', or 'file' may be provided")
    profile, name, path = values.string("profile"), values.string("name"), values.string("file")
    descriptor = values.descriptor("fd")
    if profile is not None:
        return profile.strip()
    if name is not None:
        return json.dumps({"Name": name})
    try:
        if path is not None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if descriptor is None:
            raise UsageError("No profile option parameter given to get a profile")
        with open(descriptor, "rb") as file:
            return file.read(MAX_SIZE).decode(errors="replace").strip()
    except OSError as error:
        raise UsageError(f"Unable to read profile: {error.strerror}") from error
