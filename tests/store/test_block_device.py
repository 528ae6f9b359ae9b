"""swtpm's linear layout on a block device: a TPM on a logical volume, say. Needs root and a free loop device."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from crbd.errors import StateEmptyError, StateLockedError
from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.side import SideState
from crbd.store.layout import Layout, found_in, open_state
from crbd.store.options import FileOptions

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(1 << 20)
    if os.geteuid() or shutil.which("losetup") is None:
        pytest.skip("no root, no loop device")
    made = subprocess.run(["losetup", "-f", "--show", str(disk)], check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    path = Path(made.stdout.strip())
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.with_name(path.name + ".registers").unlink()
        subprocess.run(["losetup", "-d", str(path)], check=True)


def test_a_block_device(device: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is made beside it: /dev is no place for files."""
    assert found_in(device) is Layout.LINEAR
    with pytest.raises(StateEmptyError):
        open_state(device, create=False)
    mode = device.stat().st_mode
    store = open_state(device, create=True, options=FileOptions(mode=0o644, adopt_mode=True))
    assert store.load(PERMANENT) is None
    store.commit({PERMANENT: b"one", VOLATILE: b"v"}, SideState(None, Session(0, 4096, False, 0)))
    with pytest.raises(StateLockedError):
        open_state(device, create=False)
    assert "registers are not kept" in caplog.text
    assert store.load_side() is None
    store.commit({PERMANENT: b"two"})
    store.close()
    again = open_state(device, create=False)
    assert [again.load(PERMANENT), again.load(VOLATILE)] == [b"two", b"v"]
    again.close()
    assert device.stat().st_mode == mode
    assert list(device.parent.glob(f"{device.name}.*")) == []
