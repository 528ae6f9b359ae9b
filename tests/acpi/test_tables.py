"""The tables: what iasl says they are, and what they do when ACPICA's interpreter, which Linux has, runs them."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from crbd.acpi.slot import parse_slot
from crbd.acpi.tables import PciFunction, ssdt, table, tpm2
from crbd.vfiouser.configuration import DEVICE, VENDOR
from crbd.vfiouser.spec import BAR_SIZE

HERE = Path(__file__).parent
FUNCTION = PciFunction(VENDOR, DEVICE, BAR_SIZE)
HEADER = 36
needs_acpica = pytest.mark.skipif(
    shutil.which("iasl") is None or shutil.which("acpiexec") is None, reason="needs the Debian package acpica-tools"
)


def test_header_and_checksum() -> None:
    made = table("ABCD", 3, b"body")
    assert struct.unpack_from("<4sIB", made) == (b"ABCD", HEADER + 4, 3)
    assert sum(made) & 0xFF == 0
    assert made[HEADER:] == b"body"


def test_tpm2() -> None:
    made = tpm2()
    assert len(made) == 52
    # Platform class client, reserved, control area yet to be told, start method CRB.
    assert struct.unpack_from("<4sIB", made) == (b"TPM2", 52, 4)
    assert struct.unpack_from("<HHQI", made, HEADER) == (0, 0, 0, 7)


def test_ids_are_those_of_the_served_device() -> None:
    assert struct.pack("<HH", VENDOR, DEVICE) in ssdt(parse_slot("10.0"), FUNCTION)
    other = ssdt(parse_slot("10.0"), PciFunction(0x1234, 0x5678, 0x1000))
    assert struct.pack("<HH", 0x1234, 0x5678) in other
    assert struct.pack("<HH", VENDOR, DEVICE) not in other


def compiled(source: Path, directory: Path, *options: str) -> Path:
    """The table that iasl makes of it, without optimizing anything."""
    prefix = directory / source.stem
    done = subprocess.run(["iasl", "-oa", "-p", prefix, *options, source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return prefix.with_suffix(".aml")


@needs_acpica
def test_iasl_makes_the_same_of_what_it_means(tmp_path: Path) -> None:
    wanted = compiled(HERE / "expected.asl", tmp_path).read_bytes().replace(b"X18_", b"S18_").replace(b"X80_", b"S80_")
    made = ssdt(parse_slot("3.0/10.0"), FUNCTION)
    assert made[10:28] == wanted[10:28]  # whose table it is
    # iasl puts `If (Zero) { External ... }` in front: 0xA0, its length, and so on.
    assert wanted[HEADER] == 0xA0
    assert made[HEADER:].hex() == wanted[HEADER + 1 + wanted[HEADER + 1] :].hex()


@dataclass(frozen=True, slots=True)
class Answers:
    """What the interpreter said of the TPM's device."""

    present: int
    resources: str
    control_area: int
    checksum: int
    memory_on: int


_PCI = "\\_SB.PCI0.S80"
_ASKED = (f"{_PCI}.TPM._STA", f"{_PCI}.TPM._CRS", f"{_PCI}.TPM.TCTL", f"{_PCI}.TPM.TSUM", f"{_PCI}.TMEM")
_NO_MEMORY = "86090001" + "00000000" + "00200000" + "7900"


def run(directory: Path, *commands: str, named: bool = True) -> list[str]:
    """What each of these evaluations returned: a hexadecimal number, or bytes with spaces between."""
    machine = compiled(HERE / "machine.asl", directory, *(["-DNAMED"] if named else []))
    (directory / "ssdt.aml").write_bytes(ssdt(parse_slot("10.0"), FUNCTION))
    (directory / "tpm2.aml").write_bytes(tpm2())
    command = ["acpiexec", "-b", "; ".join(f"evaluate {each}" for each in commands)]
    tables = [machine, directory / "ssdt.aml", directory / "tpm2.aml"]
    done = subprocess.run([*command, *tables], capture_output=True, text=True, check=False, cwd=directory)
    said = done.stdout + done.stderr
    assert not re.search("error|AE_", said, re.IGNORECASE), said
    found = re.findall(r"\[Integer\] = ([0-9A-F]+)|\[Buffer\] Length \w+ =\s+0000: ((?:[0-9A-F]{2} )+)", said)
    return [integer or buffer for integer, buffer in found]


def answers(directory: Path, *bars: int, identity: int = DEVICE << 16 | VENDOR, named: bool = True) -> list[Answers]:
    """With BAR 0 at each of `bars` in turn."""
    commands = [f"\\SETI {identity:#x}"]
    for bar in bars:
        commands += [f"\\SETB {bar:#x}", *_ASKED]
    returned = run(directory, *commands, named=named)
    assert len(returned) == len(_ASKED) * len(bars), returned
    rows = [returned[start : start + len(_ASKED)] for start in range(0, len(returned), len(_ASKED))]
    return [
        Answers(int(present, 16), resources.replace(" ", "").lower(), int(area, 16), int(checksum, 16), int(on, 16))
        for present, resources, area, checksum, on in rows
    ]


def checksum_with(control_area: int) -> int:
    """The checksum that makes the TPM2 table with that control area right."""
    return table("TPM2", 4, struct.pack("<HHQI", 0, 0, control_area, 7))[9]


@needs_acpica
@pytest.mark.parametrize("named", [True, False], ids=["device has a name", "device has none"])
def test_resources_follow_the_bar(named: bool, tmp_path: Path) -> None:
    """And the TPM2 table does, its checksum included, however often it is moved."""
    first, second, again = answers(tmp_path, 0xFEBF2000, 0x10000000, 0x10000000, named=named)
    assert first == Answers(
        0xF, "86090001" + "0020bffe" + "00200000" + "7900", 0xFEBF2040, checksum_with(0xFEBF2040), 1
    )
    assert second == again
    assert second == Answers(
        0xF, "86090001" + "00000010" + "00200000" + "7900", 0x10000040, checksum_with(0x10000040), 1
    )


@needs_acpica
def test_a_bar_without_an_address_is_left_alone(tmp_path: Path) -> None:
    assert answers(tmp_path, 0) == [Answers(0xF, _NO_MEMORY, 0, tpm2()[9], 0)]


@needs_acpica
def test_another_device_in_the_slot(tmp_path: Path) -> None:
    assert answers(tmp_path, 0xFEBF2000, identity=0x100E8086) == [Answers(0, _NO_MEMORY, 0, tpm2()[9], 0)]


@needs_acpica
def test_resources_before_the_status(tmp_path: Path) -> None:
    """An early _CRS says nothing and touches nothing."""
    commands = [f"\\SETI {DEVICE << 16 | VENDOR:#x}", "\\SETB 0xFEBF2000"]
    resources, on = run(tmp_path, *commands, _ASKED[1], _ASKED[4])
    assert resources.replace(" ", "") == _NO_MEMORY
    assert int(on, 16) == 0
