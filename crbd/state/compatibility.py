"""Whether the engine that runs here may be given a blob: judged before it sees a byte of it.

libtpms reads the state of every earlier release, and of a later one with the same major and minor version. What a later
minor version wrote it rejects at best; with a profile it does not know (libtpms 0.10 and later lock a TPM to a set of
commands and algorithms by a named profile, and to a StateFormatLevel) it may do worse. Levels and profiles by release:
libtpms' TPMLIB_SetProfile(3) and RuntimeProfile.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from crbd.errors import StateNewerError
from crbd.state.saved import TpmState


class Version(Protocol):
    """Of a running library; `crbd.engine.port.EngineVersion` is one."""

    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def micro(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Release:
    version: tuple[int, int]
    highest_level: int
    profiles: frozenset[str]


_RELEASES: Final = (
    _Release((0, 9), 1, frozenset({"", "null"})),
    _Release((0, 10), 7, frozenset({"", "null", "default-v1", "custom"})),
    _Release((0, 11), 8, frozenset({"", "null", "default-v1", "default-v2", "custom"})),
)
_CUSTOM_PREFIX = "custom:"


def check_engine(section: TpmState, running: Version, name: str = "the TPM state") -> None:
    """Raises StateNewerError, naming what to install, for a blob that libtpms `running` must not be given."""
    engine = section.engine
    here = (running.major, running.minor)
    shown = f"{running.major}.{running.minor}.{running.micro}"
    if (engine.major, engine.minor) > here:
        raise StateNewerError(
            f"{name} was written by libtpms {engine.version}, and this is libtpms {shown}",
            f"install libtpms {engine.major}.{engine.minor} or newer",
        )
    release = _newest_not_after(here)
    profile = "custom" if engine.profile.startswith(_CUSTOM_PREFIX) else engine.profile
    if profile not in release.profiles:
        raise StateNewerError(
            f"{name} is of a TPM with profile {engine.profile!r}, which libtpms {shown} is not known to have",
            f"install {_release_with_profile(profile)} or newer",
        )
    # A release newer than the table may have levels that the table does not know.
    newer_than_table = here > _RELEASES[-1].version
    if engine.format_level > release.highest_level and not newer_than_table:
        raise StateNewerError(
            f"{name} has StateFormatLevel {engine.format_level}, and libtpms {shown} reads up to "
            f"{release.highest_level}",
            f"install {_release_with_level(engine.format_level)} or newer",
        )


def _newest_not_after(version: tuple[int, int]) -> _Release:
    found = _RELEASES[0]
    for release in _RELEASES:
        if release.version <= version:
            found = release
    return found


def _release_with_profile(profile: str) -> str:
    return _first(release for release in _RELEASES if profile in release.profiles)


def _release_with_level(level: int) -> str:
    return _first(release for release in _RELEASES if level <= release.highest_level)


def _first(releases: Iterator[_Release]) -> str:
    """The first one's number, or what is known of a release that is not in the table."""
    release = next(releases, None)
    if release is None:
        return "the libtpms that wrote it"
    major, minor = release.version
    return f"libtpms {major}.{minor}"
