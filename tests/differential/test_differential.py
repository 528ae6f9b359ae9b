"""The same stimuli to Debian's swtpm and to crbd in its place: what differs is listed with its reason, or wrong."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from . import scenarios_control, scenarios_data, scenarios_options, scenarios_process, scenarios_state, scenarios_tools
from .comparison import SCENARIOS, Difference, Seen, differences, listed
from .subject import DEBIAN, Subject, crbd

pytestmark = pytest.mark.e2e

PLAYS = (
    scenarios_control, scenarios_data, scenarios_options, scenarios_process, scenarios_state, scenarios_tools,
)  # fmt: skip
"""Their import is what fills SCENARIOS."""


def observed(name: str, subject: Subject) -> Seen:
    """Play one scenario with one subject, in a place of its own with a short path (sockets need that)."""
    seen = Seen()
    with tempfile.TemporaryDirectory(prefix="crbd-") as place:
        SCENARIOS[name](subject, Path(place), seen)
    assert seen.values, "a scenario that observes nothing"
    return seen


@pytest.mark.parametrize("name", SCENARIOS)
def test_differences_are_the_listed_ones(name: str) -> None:
    found = differences(name, observed(name, DEBIAN), observed(name, crbd()))
    rows = [row for row in listed() if row.scenario == name]
    unexpected = [difference for difference in found if not any(row.covers(difference) for row in rows)]
    gone = [row for row in rows if not any(row.covers(difference) for difference in found)]
    assert not unexpected, "not listed in docs/swtpm-differences.md:\n" + "\n".join(map(str, unexpected))
    assert not gone, "listed, but there is no such difference:\n" + "\n".join(map(str, gone))


def test_every_row_is_of_a_scenario() -> None:
    assert {row.scenario for row in listed()} <= SCENARIOS.keys()


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.skipif(os.environ.get("HYPOTHESIS_PROFILE") != "nightly", reason="of the harness, not of crbd; nightly")
def test_swtpm_is_no_different_from_itself(name: str) -> None:
    """What is observed does not depend on chance: a difference between two runs of one program would mean nothing."""
    again: list[Difference] = differences(name, observed(name, DEBIAN), observed(name, DEBIAN))
    assert not again, "\n".join(map(str, again))
