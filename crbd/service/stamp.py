"""Which engine writes a TPM's state, for the store that marks it with that."""

from __future__ import annotations

import json

from crbd.engine.port import Engine
from crbd.state.saved import EngineStamp

_INFO_ACTIVE_PROFILE = 32
"""libtpms' TPMLIB_INFO_ACTIVE_PROFILE."""


def stamp_of(engine: Engine) -> EngineStamp:
    """Which engine this is; with the profile of its TPM where the library has profiles and the TPM is on."""
    version = engine.version
    if not (engine.supports_profiles and engine.running):
        return EngineStamp(version.major, version.minor, version.micro)
    profile = json.loads(engine.info(_INFO_ACTIVE_PROFILE)).get("ActiveProfile", {})
    name, level = profile.get("Name", ""), profile.get("StateFormatLevel", 0)
    return EngineStamp(version.major, version.minor, version.micro, name, level)
