"""`crbd acpi`."""

from __future__ import annotations

import shutil
import stat
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from crbd.acpi import grub
from crbd.acpi.slot import parse_slot
from crbd.acpi.tables import PciFunction, ssdt, tpm2
from crbd.cli.main import main
from crbd.vfiouser.configuration import DEVICE, VENDOR
from crbd.vfiouser.spec import BAR_SIZE

X86 = ("--slot", "10.0", "--arch", "x86")
ARM = ("--slot", "10.0", "--arch", "aarch64")


def ok(*arguments: str) -> None:
    assert main(["acpi", *arguments]) == 0


def test_tables_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a,b"
    ok("--slot", "3.0/0.0", "--arch", "x86", "--out", str(out))
    assert (out / "tpm2.aml").read_bytes() == tpm2()
    assert (out / "ssdt.aml").read_bytes() == ssdt(parse_slot("3.0/0.0"), PciFunction(VENDOR, DEVICE, BAR_SIZE))
    assert sorted(path.name for path in out.iterdir()) == ["ssdt.aml", "tpm2.aml"]
    # QEMU runs as another user, and takes a comma for the end of a value.
    assert stat.S_IMODE((out / "ssdt.aml").stat().st_mode) == 0o644
    place = f"{tmp_path}/a,,b"
    assert capsys.readouterr().out == f"-acpitable file={place}/tpm2.aml\n-acpitable file={place}/ssdt.aml\n"


def test_the_same_again_in_place_of_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "ssdt.aml").write_bytes(b"old")
    ok(*X86, "--out", str(tmp_path))
    assert (tmp_path / "ssdt.aml").read_bytes()[:4] == b"SSDT"


def test_aarch64_without_grub_leaves_the_tables_to_the_operator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ok(*ARM, "--out", str(tmp_path))
    assert (tmp_path / "tpm2.aml").exists()
    assert not (tmp_path / "esp").exists()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("arguments", "refusal"),
    [
        (("--slot", "1g", "--arch", "x86", "--out", "."), (2, "--slot '1g'")),
        (("--slot", "10.0", "--arch", "x86", "--out", ".", "--grub"), (2, "--grub is for --arch aarch64")),
        (("--slot", "10.0", "--arch", "arm", "--out", "."), (2, "--arch")),
        ((*X86, "--out", "/dev/null"), (1, "cannot write to /dev/null")),
        ((*X86, "--out", "/absent/deeper"), (1, "cannot write to /absent/deeper")),
        (
            (*ARM, "--out", ".", "--grub", "--grub-modules", "/absent"),
            (1, "no modules of GRUB for arm64-efi in /absent"),
        ),
    ],
)
def test_refusals(
    arguments: Sequence[str],
    refusal: tuple[int, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, said = refusal
    assert main(["acpi", *arguments]) == status
    text = capsys.readouterr().err
    assert text.startswith("crbd: ")
    assert text.count("\n") == 1
    assert said in text
    assert list(tmp_path.iterdir()) == []


def modules(directory: Path, version: str) -> Path:
    """A directory that looks like GRUB's, without a module in it."""
    (directory / "modinfo.sh").write_text(f'#!/bin/bash\n# Version\ngrub_version="{version}"\n')
    return directory


@pytest.mark.parametrize(("version", "release"), [("2.06", "2.06"), ("1.99", "1.99"), ("", "unknown")])
def test_old_grub(version: str, release: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--grub", "--grub-modules", str(modules(tmp_path, version)))
    assert main(["acpi", *ARM, "--out", str(tmp_path / "out"), *arguments]) == 1
    assert f"is too old ({release})" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("grub-mkimage") is None, reason="needs the Debian package grub-common")
def test_modules_that_grub_cannot_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--grub", "--grub-modules", str(modules(tmp_path, "2.12")))
    assert main(["acpi", *ARM, "--out", str(tmp_path / "out"), *arguments]) == 1
    text = capsys.readouterr().err
    assert text.startswith("crbd: grub-mkimage failed: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_grub_mkimage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ("--grub", "--grub-modules", str(modules(tmp_path, "2.12")))
    assert main(["acpi", *ARM, "--out", str(tmp_path / "out"), *arguments]) == 1
    assert "grub-mkimage is missing" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("grub-script-check") is None, reason="needs the Debian package grub-common")
def test_script_is_one_of_grubs(tmp_path: Path) -> None:
    script = tmp_path / "grub.cfg"
    script.write_text(grub.SCRIPT)
    subprocess.run(["grub-script-check", script], check=True)
