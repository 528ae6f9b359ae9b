"""What was observed, and the table of the differences that are on purpose (docs/swtpm-differences.md)."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .subject import Subject

TABLE = Path(__file__).resolve().parent.parent.parent / "docs" / "swtpm-differences.md"


class Seen:
    """Observations of one subject in one scenario, by name."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def note(self, name: str, value: object) -> None:
        """An observation. Each has a name of its own."""
        assert name not in self.values, f"{name} was noted before"
        self.values[name] = str(value)


Scenario = Callable[[Subject, Path, Seen], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(play: Scenario) -> Scenario:
    """Enter a function into SCENARIOS, under its name with blanks."""
    SCENARIOS[play.__name__.replace("_", " ")] = play
    return play


@dataclass(frozen=True, slots=True)
class Difference:
    """A row of the table, or a difference that was found."""

    scenario: str
    name: str
    swtpm: str
    crbd: str

    def covers(self, found: Difference) -> bool:
        """Whether this row tells of that difference: `…` in a cell stands for anything."""
        mine = (self.scenario, self.name, self.swtpm, self.crbd)
        theirs = (found.scenario, found.name, found.swtpm, found.crbd)
        return all(_fits(row, value) for row, value in zip(mine, theirs, strict=True))

    def __str__(self) -> str:
        cells = (self.scenario, self.name, self.swtpm, self.crbd)
        return " | ".join(("", *(f"`{_escape(cell)}`" for cell in cells), "why", "")).strip()


def differences(scenario: str, swtpm: Seen, crbd: Seen) -> list[Difference]:
    """Every observation that the two do not share. `-` stands for one that was not made."""
    names = dict.fromkeys((*swtpm.values, *crbd.values))
    pairs = ((name, swtpm.values.get(name, "-"), crbd.values.get(name, "-")) for name in names)
    return [Difference(scenario, name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]


def listed(path: Path = TABLE) -> list[Difference]:
    """The rows of the table: the lines whose first cell is in backquotes."""
    rows = []
    for line in path.read_text().splitlines():
        if not line.startswith("| `"):
            continue
        cells = [cell.strip() for cell in line.replace("\\|", "\0").strip().strip("|").split("|")]
        assert len(cells) == 5, f"{path.name}: not five cells: {line}"
        assert cells[4], f"{path.name}: no reason: {line}"
        rows.append(Difference(*(cell.strip("`").replace("\0", "|") for cell in cells[:4])))
    return rows


def _fits(pattern: str, value: str) -> bool:
    literal = "".join(f"[{character}]" if character in "*?[" else character for character in pattern)
    return fnmatch.fnmatchcase(" ".join(value.split()), " ".join(literal.replace("…", "*").split()))


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|").replace("`", "'")
