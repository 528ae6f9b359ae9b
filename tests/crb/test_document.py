"""docs/crb-registers.md is what the tables say now."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from crbd.crb import document
from crbd.crb.spec import REGISTERS

DOCUMENT = Path(__file__).parents[2] / "docs" / "crb-registers.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document.render(), (
        "python -m crbd.crb.document > docs/crb-registers.md"
    )


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(document.__file__, run_name="__main__")
    assert capsys.readouterr().out == document.render()


def test_every_register_and_field_is_in_it() -> None:
    text = document.render()
    for register in REGISTERS:
        assert f"| 0x{register.offset:02X} | {register.name}" in text
        for field in register.fields:
            assert f"| {register.name} | " in text
            assert f"| {field.name} | " in text
