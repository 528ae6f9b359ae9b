"""docs/errors.md is what crbd says: every operator error is on it, and every row of it is provoked."""

from __future__ import annotations

from pathlib import Path

import pytest

from crbd.cli.exit_codes import operator_errors
from tests.cli.operator_errors import CASES, parse, provoke

PAGE = Path(__file__).resolve().parents[2] / "docs" / "errors.md"
MAKE = "run: python -m tests.cli.operator_errors > docs/errors.md"
ROWS = parse(PAGE.read_text())


def test_every_kind_of_error_is_on_the_page() -> None:
    missing = {kind.__name__ for kind in operator_errors()} - {row.name for row in ROWS}
    assert not missing, f"no case provokes {missing}: add one to tests/cli/operator_errors.py, then {MAKE}"


def test_the_page_has_a_row_for_every_case_in_the_order_of_the_codes() -> None:
    assert [(row.name, row.command) for row in ROWS] == [(case.kind.__name__, case.command) for case in CASES], MAKE
    assert [row.code for row in ROWS] == sorted(case.kind.exit_code for case in CASES), MAKE


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].arrange.__name__)
def test_the_page_says_what_crbd_says(number: int, tmp_path: Path) -> None:
    case, row = CASES[number], ROWS[number]
    done = provoke(case, tmp_path)
    assert done.err == f"crbd: {row.what}: {row.remedy}\n", MAKE
    assert (done.status, done.out) == (case.kind.exit_code, "")
    assert row.remedy
