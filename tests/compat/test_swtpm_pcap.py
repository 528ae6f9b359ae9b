"""`--pcap`: what is written down, with which mode, and that Wireshark reads it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .swtpm_processes import GET_RANDOM, connected, end, mode_of, run_command, running


def _record(place: Path, option: str, *, pass_fds: tuple[int, ...] = ()) -> bytes:
    """Run a TPM that sends its own TPM2_Startup and TPM2_Shutdown, and ask it for random bytes; the answer."""
    data = place / "data"
    arguments = ("--server", f"type=unixio,path={data}", "--flags", "startup-clear", "--pcap", option)
    with running(place, *arguments, pass_fds=pass_fds) as process:
        with connected(data) as client:
            answer = run_command(client, GET_RANDOM)
        assert end(process) == 0
    return answer


def test_the_file(tmp_path: Path) -> None:
    """28 and 20 bytes of heads; 86 + 2 of padding for each of 6 empty segments; three commands, three responses."""
    file = tmp_path / "pcap"
    answer = _record(tmp_path, f"file={file}")
    content = file.read_bytes()
    sizes = [12, 10, len(GET_RANDOM), len(answer), 12, 10]
    assert len(content) == 48 + 6 * 88 + sum(28 + 54 + size + -(54 + size) % 4 + 4 for size in sizes)
    assert GET_RANDOM in content
    assert answer in content
    assert mode_of(file) == 0o640
    second = _record(tmp_path, f"file={file},mode=0600")
    assert file.read_bytes().startswith(content)
    assert second in file.read_bytes()
    assert mode_of(file) == 0o600
    _record(tmp_path, f"file={file},truncate")
    assert answer not in file.read_bytes()


def test_a_descriptor(tmp_path: Path) -> None:
    file = tmp_path / "pcap"
    file.write_bytes(b"what was there")
    number = os.open(file, os.O_RDWR)
    answer = _record(tmp_path, f"fd={number}", pass_fds=(number,))
    assert file.read_bytes().startswith(b"what was there\n\r\r\n")
    assert answer in file.read_bytes()
    _record(tmp_path, f"fd={number},truncate", pass_fds=(number,))
    assert file.read_bytes().startswith(b"\n\r\r\n")
    os.close(number)


def test_a_file_that_cannot_be_written_does_not_stop_the_tpm(tmp_path: Path) -> None:
    number = os.open("/dev/full", os.O_WRONLY)
    mode = mode_of(Path("/dev/full"))
    try:
        answer = _record(tmp_path, f"fd={number},mode={mode:o}", pass_fds=(number,))
    finally:
        os.close(number)
    assert answer[6:10] == bytes(4)


@pytest.mark.e2e
@pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")
def test_wireshark_reads_it(tmp_path: Path) -> None:
    file = tmp_path / "pcap"
    _record(tmp_path, f"file={file},checksums")
    options = ["-o", "ip.check_checksum:TRUE", "-o", "tcp.check_checksum:TRUE"]
    fields = ["frame.protocols", "tpm.req.cc", "tpm.resp.rc", "ip.checksum.status", "tcp.checksum.status"]
    shown = subprocess.run(
        ["tshark", "-r", str(file), *options, "-T", "fields", *(word for field in fields for word in ("-e", field))],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    rows = [line.split("\t") for line in shown.splitlines()]
    assert len(rows) == 12
    # 1 is good.
    assert {(row[3], row[4]) for row in rows} == {("1", "1")}
    tpm = [row for row in rows if row[0].endswith(":tpm")]
    assert [int(row[1], 16) for row in tpm if row[1]] == [0x144, 0x17B, 0x145]
    assert [int(row[2], 16) for row in tpm if row[2]] == [0, 0, 0]
