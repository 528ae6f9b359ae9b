"""The same life behind every mapping: equal effects, equal registers, equal responses.

One stateful machine drives split, page and served mapping through random accesses, answers, failures, cancels, resets
and freezes at any moment. Whatever happens, every device also freezes to something that may be thawed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar
from unittest import TestCase

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE, CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Effect
from crbd.crb.mapping.page import PageMapping
from crbd.crb.mapping.served import ServedMapping
from crbd.crb.mapping.split import SplitMapping
from crbd.crb.spec import Offset
from crbd.state import crb as saved_form

from .histories import Action, act, actions

Mapping = type[SplitMapping] | type[PageMapping] | type[ServedMapping]
ADDRESSES = {Offset.CMD_LADDR, Offset.CMD_HADDR, Offset.RSP_ADDR, Offset.RSP_ADDR + 4}


class Seat:
    """One device behind one mapping."""

    def __init__(self, config: CrbConfig, make: Mapping) -> None:
        self.make = make
        self.served = make is ServedMapping
        self.config = replace(config, separate_buffer=True) if self.served else config
        self.memory = bytearray(config.buffer_size)
        self.sit(CrbDevice(self.config, self.separate()))

    def separate(self) -> memoryview | None:
        return memoryview(self.memory) if self.served else None

    def sit(self, device: CrbDevice) -> None:
        self.device = device
        self.mapping = self.make(device)

    def refreeze(self) -> None:
        version, body = saved_form.encode(saved_form.saved(self.device.freeze()))
        self.memory = bytearray(self.config.buffer_size)
        snapshot = saved_form.snapshot_of(saved_form.lift(saved_form.decode(version, body)))
        self.sit(CrbDevice.thaw(self.config, snapshot, self.separate()))

    def where(self, locality: int, offset: int) -> int:
        """Of an offset in a page, where the mapping has it."""
        if self.served and offset >= BUFFER_OFFSET:
            return self.config.localities * PAGE_SIZE + offset - BUFFER_OFFSET
        return locality * PAGE_SIZE + offset

    def write(self, locality: int, offset: int, data: bytes) -> tuple[Effect, ...]:
        # An access over the end of the registers goes on in the buffer, which is elsewhere where it is served.
        registers = data[: max(BUFFER_OFFSET - offset, 0)]
        effects = self.mapping.write(self.where(locality, offset), registers) if registers else ()
        if len(registers) < len(data) and locality == self.device.freeze().owner:
            at = self.where(locality, max(offset, BUFFER_OFFSET))
            effects += self.mapping.write(at, data[len(registers) :])
        return effects

    def control_areas(self) -> list[bytes]:
        """Of every locality, without the addresses of the buffer."""
        areas = []
        for locality in range(self.config.localities):
            area = bytearray(self.mapping.read(locality * PAGE_SIZE, BUFFER_OFFSET))
            for offset in ADDRESSES:
                area[offset : offset + 4] = bytes(4)
            areas.append(bytes(area))
        return areas

    def buffer(self) -> bytes:
        return self.mapping.read(self.where(self.device.freeze().owner, BUFFER_OFFSET), self.config.buffer_size)


class Equivalence(RuleBasedStateMachine):
    """`config` and the mappings to compare."""

    config: ClassVar[CrbConfig]
    mappings: ClassVar[tuple[Mapping, ...]] = (SplitMapping, PageMapping, ServedMapping)

    def __init__(self) -> None:
        super().__init__()
        self.seats = [Seat(self.config, mapping) for mapping in self.mappings]

    @rule(data=st.data())
    def something_happens(self, data: st.DataObject) -> None:
        action: Action = data.draw(actions(self.config))
        if action[0] == "refreeze":
            for seat in self.seats:
                seat.refreeze()
            return
        first, *others = (act(seat.device, action, seat.write) for seat in self.seats)
        assert all(other == first for other in others)

    @rule(offset=st.integers(0, 0xFFF), size=st.integers(1, 32), locality=st.integers(0, 4))
    def a_read_of_any_width_and_alignment(self, offset: int, size: int, locality: int) -> None:
        """Through the page as memory, as a mapping guest does it, and through `read`."""
        for seat in self.seats:
            before = seat.device.freeze()
            read = seat.mapping.read(locality * PAGE_SIZE + offset, size)
            assert len(read) == size
            assert seat.device.freeze() == before
            if locality < self.config.localities and offset + size <= PAGE_SIZE and not seat.served:
                assert read == bytes(seat.device.page(locality)[offset : offset + size])
                assert read == seat.device.read(locality, offset, size)

    @invariant()
    def they_are_the_same(self) -> None:
        first, *others = self.seats
        for other in others:
            assert other.control_areas() == first.control_areas()
            assert other.buffer() == first.buffer()
            assert other.device.executing == first.device.executing
            assert other.device.state == first.device.state

    @invariant()
    def every_moment_may_be_frozen(self) -> None:
        for seat in self.seats:
            frozen = seat.device.freeze()
            memory = memoryview(bytearray(self.config.buffer_size)) if seat.served else None
            assert CrbDevice.thaw(seat.config, frozen, memory).freeze() == frozen


class OfQemu7(Equivalence):
    config = CrbConfig.qemu_7_2()


class OfQemu11(Equivalence):
    config = CrbConfig.qemu_11(9000)


class OfOneLocality(Equivalence):
    config = CrbConfig(localities=1, buffer_size=96, max_command=300)


class OfFiveLocalities(Equivalence):
    config = CrbConfig(buffer_size=64, max_command=200)
    mappings = (PageMapping, ServedMapping)


class OfThreeWithoutBypassAndChunks(Equivalence):
    config = CrbConfig(localities=3, buffer_size=64, idle_bypass=False, chunking=False)
    mappings = (PageMapping, ServedMapping)


def _case(machine: type[Equivalence]) -> type[TestCase]:
    case = machine.TestCase
    case.settings = settings(max_examples=30, stateful_step_count=40, deadline=None)
    return case


TestQemu7 = _case(OfQemu7)
TestQemu11 = _case(OfQemu11)
TestOneLocality = _case(OfOneLocality)
TestFiveLocalities = _case(OfFiveLocalities)
TestThreeWithoutBypassAndChunks = _case(OfThreeWithoutBypassAndChunks)
