"""Devices in the middle of things, made by accesses alone: what the golden files hold and the saved forms are tried on.

Run as a module it makes the golden files that are not there yet; those that are there are never made again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.spec import Offset
from crbd.state import crb as saved_form

from .driver import GO_IDLE, NEXT, REQUEST_ACCESS, SEIZE, command, fill_buffer, put, ready, response, run, start

GOLDEN = Path(__file__).parent / "golden"
SMALL = CrbConfig(localities=1, idle_bypass=False, chunking=False, buffer_size=0x200)
CHUNKS = CrbConfig(buffer_size=96, max_command=300)


def fresh() -> CrbDevice:
    return CrbDevice(CrbConfig.qemu_7_2())


def answered() -> CrbDevice:
    device = CrbDevice(CrbConfig.qemu_7_2())
    run(device, command(40), response(100))
    return device


def idle_after_failure() -> CrbDevice:
    device = CrbDevice(CrbConfig.qemu_7_2())
    start(device)
    device.fail()
    put(device, Offset.CTRL_REQ, GO_IDLE)
    device.set_established(True)
    return device


def executing() -> CrbDevice:
    device = CrbDevice(CrbConfig.qemu_7_2())
    start(device, command(33))
    return device


def small_buffer() -> CrbDevice:
    device = CrbDevice(SMALL)
    ready(device)
    fill_buffer(device, command(0x200))
    return device


def five_localities() -> CrbDevice:
    device = CrbDevice(CrbConfig())
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS, 2)
    put(device, Offset.INT_ENABLE, 0x8000000F, 2)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    put(device, Offset.LOC_CTRL, REQUEST_ACCESS, 0)
    run(device, locality=3)
    return device


def half_a_command() -> CrbDevice:
    device = CrbDevice(CHUNKS)
    ready(device)
    fill_buffer(device, command(250)[:96])
    put(device, Offset.CTRL_START, NEXT)
    return device


def half_a_response() -> CrbDevice:
    device = CrbDevice(CHUNKS)
    run(device, answer=response(250))
    put(device, Offset.CTRL_START, NEXT)
    return device


def seized_while_executing() -> CrbDevice:
    device = CrbDevice(CHUNKS)
    start(device, locality=1)
    put(device, Offset.CTRL_CANCEL, 1, locality=1)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    return device


def separate_buffer() -> CrbDevice:
    config = CrbConfig(localities=2, separate_buffer=True, buffer_size=128, base=0x8000000000)
    device = CrbDevice(config, memoryview(bytearray(128)))
    device.submit(1, command(90))
    return device


Maker = Callable[[], CrbDevice]
OLD: tuple[Maker, ...] = (fresh, answered, idle_after_failure, executing, small_buffer)
"""What versions 1 and 2 can say."""
NEW: tuple[Maker, ...] = (
    five_localities,
    half_a_command,
    half_a_response,
    seized_while_executing,
    separate_buffer,
)
"""What only version 3 can."""
FILES: dict[str, tuple[int, Maker]] = {
    f"v{version}-{make.__name__.replace('_', '-')}.bin": (version, make)
    for version, makers in ((1, OLD), (2, OLD), (3, OLD + NEW))
    for make in makers
}


def thaw(config: CrbConfig, state: saved_form.CrbState) -> CrbDevice:
    """What a daemon does with a section it has decoded."""
    memory = memoryview(bytearray(config.buffer_size)) if config.separate_buffer else None
    return CrbDevice.thaw(config, saved_form.snapshot_of(saved_form.lift(state)), memory)


if __name__ == "__main__":
    for name, (version, make) in FILES.items():
        path = GOLDEN / name
        if not path.exists():
            path.write_bytes(saved_form.encode(saved_form.lower(saved_form.saved(make().freeze()), version))[1])
            print(f"made {path}")
