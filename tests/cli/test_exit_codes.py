"""Exit codes are unique, and their page is what the code says."""

from __future__ import annotations

from pathlib import Path

from crbd.cli.exit_codes import operator_errors, render

PAGE = Path(__file__).resolve().parents[2] / "docs" / "exit-codes.md"


def test_every_error_has_a_code_of_its_own() -> None:
    codes = [kind.exit_code for kind in operator_errors()]
    assert len(set(codes)) == len(codes)
    assert all(0 < code < 64 for code in codes), "64 and above are sysexits, shells and signals"
    meanings = [kind.meaning for kind in operator_errors()]
    assert len(set(meanings)) == len(meanings)


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == render(), "run: python -m crbd.cli.exit_codes > docs/exit-codes.md"
