"""docs/control-channel.md is what the table says now."""

from __future__ import annotations

from pathlib import Path

from crbd.control.document import page

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "control-channel.md"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m crbd.control.document > docs/control-channel.md"
