"""Which engine writes a TPM's state, for the store that marks it with that; and when it was written, for people."""

from __future__ import annotations

import json
import time

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


def moment(written: int) -> str:
    """Seconds since 1970 as people write them, in UTC; as it is what no calendar has, which a file may say."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(written))
    except (OverflowError, ValueError, OSError):
        return f"second {written} since 1970"
