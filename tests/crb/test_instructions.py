"""Real instructions against the mappings: a small driver for AArch64 and one for x86-64, each through a whole command.

Unicorn executes them. Against the page mapping the guest's page *is* the device's memory, mapped without write
permission: LDP and MOVDQU read it with no code of ours in between. A store faults, is given to the mapping with its
width, and the instruction is skipped, as a hypervisor does it. Against the split and the served mapping, reads of
registers trap as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest

from crbd.crb.config import PAGE_SIZE, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect, Execute
from crbd.crb.mapping.page import PageMapping
from crbd.crb.mapping.served import ServedMapping
from crbd.crb.mapping.split import SplitMapping
from crbd.crb.spec import Offset

from .driver import command, response, word

# By this road mypy leaves them alone: unicorn has no types for what is used here.
uc = import_module("unicorn")
arm = import_module("unicorn.arm64_const")
x86 = import_module("unicorn.x86_const")

CODE, MEMORY = 0x10000, 0x20000
COMMAND_AT, RESPONSE_AT = MEMORY, MEMORY + 0x1000
BUSY_FOR = 50
"""Instructions that the driver spends waiting before the response is there."""
LIMIT = 200_000
"""Instructions; a driver that needs more hangs."""
DRIVERS = Path(__file__).parent / "drivers"

Mapping = SplitMapping | PageMapping | ServedMapping


@dataclass(frozen=True)
class Processor:
    """How to drive one architecture."""

    arch: int
    mode: int
    code: str
    arguments: tuple[int, ...]
    """The registers for page, command, its length, and where the response goes."""
    program_counter: int
    result: int


AARCH64 = Processor(
    uc.UC_ARCH_ARM64, uc.UC_MODE_ARM, "aarch64.bin",
    (arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2, arm.UC_ARM64_REG_X3),
    arm.UC_ARM64_REG_PC, arm.UC_ARM64_REG_X0,
)  # fmt: skip
X86_64 = Processor(
    uc.UC_ARCH_X86, uc.UC_MODE_64, "x86_64.bin",
    (x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX, x86.UC_X86_REG_R8),
    x86.UC_X86_REG_RIP, x86.UC_X86_REG_RAX,
)  # fmt: skip


class Guest:
    """A processor that runs its driver once, with a TPM that takes its time."""

    def __init__(self, processor: Processor, device: CrbDevice, mapping: Mapping, answer: bytes) -> None:
        self.processor = processor
        self.device = device
        self.mapping = mapping
        self.answer = answer
        self.countdown = 0
        self.instruction = (0, 0)
        """Where the instruction that executes is, and its length."""
        self.skipped = 0
        """Where to go on after a store that was carried out by hand; 0: there was none."""
        self.executed: list[Execute] = []
        self.stores: set[int] = set()
        self.emulator = uc.Uc(processor.arch, processor.mode)
        self.emulator.mem_map(CODE, PAGE_SIZE)
        self.emulator.mem_map(MEMORY, 0x3000)
        self.emulator.hook_add(uc.UC_HOOK_CODE, self._step)
        self._map()

    def _map(self) -> None:
        base, size = self.device.config.base, self.device.config.localities * PAGE_SIZE
        if isinstance(self.mapping, PageMapping):
            memory = self.device.page(0).obj
            self.shared = (ctypes.c_ubyte * size).from_buffer(memory)
            self.emulator.mem_map_ptr(base, size, uc.UC_PROT_READ, ctypes.addressof(self.shared))
            self.emulator.hook_add(uc.UC_HOOK_MEM_WRITE_PROT, self._fault)
            return
        self.emulator.mmio_map(base, size, self._trapped_read, None, self._trapped_write, None)
        if isinstance(self.mapping, ServedMapping):
            self.shared = (ctypes.c_ubyte * PAGE_SIZE).from_buffer(self.device.buffer.obj)
            self.emulator.mem_map_ptr(
                base + size, PAGE_SIZE, uc.UC_PROT_READ | uc.UC_PROT_WRITE, ctypes.addressof(self.shared)
            )

    def run(self, locality: int, data: bytes) -> bytes:
        """The response, as the driver read it."""
        code = (DRIVERS / self.processor.code).read_bytes()
        self.emulator.mem_write(CODE, code)
        self.emulator.mem_write(COMMAND_AT, data)
        page = self.device.config.base + locality * PAGE_SIZE
        for register, value in zip(self.processor.arguments, (page, COMMAND_AT, len(data), RESPONSE_AT), strict=True):
            self.emulator.reg_write(register, value)
        at = CODE
        while at != CODE + len(code):
            self.skipped = 0
            try:
                self.emulator.emu_start(at, CODE + len(code), count=LIMIT)
            except uc.UcError as error:
                if error.errno != uc.UC_ERR_WRITE_PROT:
                    raise
            at = self.skipped or self.emulator.reg_read(self.processor.program_counter)
            assert self.skipped or at == CODE + len(code), "the driver hangs"
        size = self.emulator.reg_read(self.processor.result)
        return bytes(self.emulator.mem_read(RESPONSE_AT, size))

    def _step(self, _uc: object, address: int, size: int, _data: object) -> None:
        self.instruction = address, size
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                self.device.complete(self.answer)

    def _fault(self, _uc: object, _access: int, address: int, size: int, value: int, _data: object) -> bool:
        self._store(address - self.device.config.base, size, value)
        self.skipped = sum(self.instruction)
        return False

    def _trapped_read(self, _uc: object, offset: int, size: int, _data: object) -> int:
        return int.from_bytes(self.mapping.read(offset, size), "little")

    def _trapped_write(self, _uc: object, offset: int, size: int, value: int, _data: object) -> None:
        self._store(offset, size, value)

    def _store(self, offset: int, size: int, value: int) -> None:
        self.stores.add(size)
        effects: tuple[Effect, ...] = self.mapping.write(offset, (value & (1 << 8 * size) - 1).to_bytes(size, "little"))
        for effect in effects:
            assert isinstance(effect, Execute)
            self.executed.append(effect)
            self.countdown = BUSY_FOR


def split() -> tuple[CrbDevice, Mapping]:
    device = CrbDevice(CrbConfig.qemu_7_2())
    return device, SplitMapping(device)


def qemu_page() -> tuple[CrbDevice, Mapping]:
    device = CrbDevice(CrbConfig.qemu_11())
    return device, PageMapping(device)


def five_pages() -> tuple[CrbDevice, Mapping]:
    device = CrbDevice(CrbConfig())
    return device, PageMapping(device)


def served() -> tuple[CrbDevice, Mapping]:
    config = CrbConfig(localities=2, separate_buffer=True, buffer_size=PAGE_SIZE, base=0xE000_0000)
    device = CrbDevice(config, memoryview(bytearray(PAGE_SIZE)))
    return device, ServedMapping(device)


@pytest.mark.parametrize("size", [12, 300])
@pytest.mark.parametrize("make", [split, qemu_page, five_pages, served], ids=lambda make: make.__name__)
@pytest.mark.parametrize("processor", [AARCH64, X86_64], ids=["aarch64", "x86_64"])
def test_a_driver_through_a_whole_command(
    processor: Processor, make: Callable[[], tuple[CrbDevice, Mapping]], size: int
) -> None:
    device, mapping = make()
    answer = response(16 * 7 + 3, fill=0x3C)
    guest = Guest(processor, device, mapping, answer)
    locality = device.config.localities // 2
    data = command(size)
    for _ in range(2):
        guest.countdown = 0
        assert guest.run(locality, data) == answer
        assert word(device, Offset.CTRL_STS, locality) == 2
        assert device.active_locality is None
    assert guest.executed == [Execute(data, locality)] * 2
    assert guest.stores == {1, 2, 4}


def test_load_pair_reads_16_bytes_of_registers() -> None:
    """What Windows does on AArch64, and what no trapped read could serve."""
    device, mapping = five_pages()
    guest = Guest(AARCH64, device, mapping, response())
    guest.run(0, command())
    page = CrbDevice(CrbConfig()).page(0)
    pair = guest.emulator.reg_read(arm.UC_ARM64_REG_X4), guest.emulator.reg_read(arm.UC_ARM64_REG_X5)
    assert pair == tuple(int.from_bytes(page[at : at + 8], "little") for at in (0x30, 0x38))
    assert guest.emulator.reg_read(arm.UC_ARM64_REG_X6) == 0


def test_movdqu_reads_16_bytes_of_registers() -> None:
    device, mapping = five_pages()
    guest = Guest(X86_64, device, mapping, response())
    guest.run(0, command())
    wanted = int.from_bytes(CrbDevice(CrbConfig()).page(0)[0x30:0x40], "little")
    assert guest.emulator.reg_read(x86.UC_X86_REG_XMM0) == wanted
