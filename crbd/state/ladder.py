"""The ladder: what each format version of a document changed, as pure one-step functions over its sections.

    1   the registers are saved as the split mapping has them: 32 words and the RAM block `tpm-crb-cmd`
    2   as one page
    3   of any number of localities, and with the chunk buffers of a transfer under way

Going up never fails for a document that its own version's reader accepts; going down fails where something would be
lost. Steps are never edited once released: a new format version adds one at each end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final

from crbd.errors import StateDamagedError, StateDowngradeError
from crbd.state import crb
from crbd.state.header import FORMAT_VERSION
from crbd.state.sections import Section, Sections

Step = Callable[[Sections], Sections]


def v1_to_v2(sections: Sections) -> Sections:
    """The two blocks of the split mapping become the page. Raises StateDamagedError."""
    return _with_crb(sections, _crb_v1_to_v2)


def v2_to_v3(sections: Sections) -> Sections:
    """The page becomes the form with localities and chunk buffers. Raises StateDamagedError."""
    return _with_crb(sections, _crb_v2_to_v3)


def v3_to_v2(sections: Sections) -> Sections:
    """Back to the page. Raises StateDowngradeError where it has no room for what the device is at."""
    return _with_crb(sections, lambda section: _lowered(section, 2))


def v2_to_v1(sections: Sections) -> Sections:
    """Back to the two blocks of the split mapping. Raises StateDowngradeError."""
    return _with_crb(sections, lambda section: _lowered(section, 1))


UP: Final[Mapping[int, Step]] = {1: v1_to_v2, 2: v2_to_v3}
"""By the format version that a step starts from."""
DOWN: Final[Mapping[int, Step]] = {3: v3_to_v2, 2: v2_to_v1}


def climb(sections: Sections, version: int) -> Sections:
    """Sections of a document of format `version` as those of the newest. Raises StateDamagedError."""
    for step in range(version, FORMAT_VERSION):
        sections = UP[step](sections)
    return sections


def descend(sections: Sections, version: int) -> Sections:
    """Sections of the newest format version as those of format `version`. Raises StateDowngradeError."""
    for step in range(FORMAT_VERSION, version, -1):
        sections = DOWN[step](sections)
    return sections


def _with_crb(sections: Sections, change: Callable[[Section], Section]) -> Sections:
    return tuple(change(section) if section.name == crb.SECTION else section for section in sections)


def _crb_v1_to_v2(section: Section) -> Section:
    state = crb.decode(section.version, section.data)
    assert isinstance(state, crb.CrbStateV1)
    return _section(section, crb.v1_to_v2(state))


def _crb_v2_to_v3(section: Section) -> Section:
    state = crb.decode(section.version, section.data)
    assert isinstance(state, crb.CrbStateV2)
    return _section(section, crb.v2_to_v3(state))


def _lowered(section: Section, version: int) -> Section:
    state = crb.lift(crb.decode(section.version, section.data))
    try:
        return _section(section, crb.lower(state, version))
    except StateDamagedError as error:
        if len(state.statuses) > 1:
            reason = f"its registers are of {len(state.statuses)} localities"
            remedy = f"keep it in format version {FORMAT_VERSION}"
        elif state.transfer is not None:
            reason = "a command or a response is under way in the registers"
            remedy = "let the guest finish it and go idle, then export again"
        else:
            reason, remedy = error.what, f"keep it in format version {FORMAT_VERSION}"
        raise StateDowngradeError(
            f"the state has no room in format version {version} (or older): {reason}",
            remedy,
        ) from error


def _section(section: Section, state: crb.CrbState) -> Section:
    version, data = crb.encode(state)
    return replace(section, version=version, data=data)
