"""The saved form: three versions, the ladder, golden files, and what is refused."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crbd.crb import spec
from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.interface import CommandInterface
from crbd.crb.pages import Pages
from crbd.crb.snapshot import NOBODY, CrbSnapshot
from crbd.crb.spec import Offset
from crbd.crb.states import State
from crbd.errors import StateDamagedError, StateNewerError
from crbd.state import crb as saved_form
from crbd.state.crb import CrbStateV1, CrbStateV2, CrbStateV3, CrbTransfer

from .driver import NEXT, buffer_of, command, fill_buffer, put, ready, response, run, start, word
from .histories import act, actions
from .saved_devices import (
    CHUNKS,
    FILES,
    GOLDEN,
    NEW,
    OLD,
    Maker,
    answered,
    executing,
    five_localities,
    fresh,
    half_a_command,
    half_a_response,
    seized_while_executing,
    separate_buffer,
    small_buffer,
    thaw,
)

every_device = pytest.mark.parametrize("make", OLD + NEW, ids=lambda make: make.__name__)


# -- nothing is forgotten
# --------------------------------------------------------------------------------------------------------


def test_every_field_of_the_device_is_saved_or_derived() -> None:
    saved = {
        "_pending": {"pending"},
        "_executor": {"executor"},
        "_command": {"command"},
        "_response": {"response"},
        "_offset": {"offset"},
        "_state": {"completed"},
        "_pages": {"words", "statuses", "buffer"},
    }
    derived_from_config = {
        "_config",
        "_at_once",
        "_table",
        "_takes_at_once",
        "_unseen",
        "_shows_all",
        "_filled",
        "_ptp",
        "_keeps_tail",
        "_zeros",
    }
    derived_from_pages = {"_memory"}
    assert set(CommandInterface.__slots__) | set(CrbDevice.__slots__) == (
        saved.keys() | derived_from_config | derived_from_pages
    )
    assert set().union(*saved.values()) == {field.name for field in fields(CrbSnapshot)}
    assert set(Pages.__slots__) == {"memory", "buffer", "control", "config", "separate"}


def test_every_field_of_the_snapshot_is_in_the_saved_form() -> None:
    in_v3 = {"completed", "statuses", "pending", "registers", "buffer", "transfer"}
    in_transfer = {"executor", "command", "response", "offset"}
    assert {field.name for field in fields(CrbStateV3)} == in_v3
    assert {field.name for field in fields(CrbTransfer)} == in_transfer
    assert {field.name for field in fields(CrbSnapshot)} == (in_v3 - {"registers", "transfer"}) | {
        "words"
    } | in_transfer


def test_every_saved_value_makes_a_difference() -> None:
    """A field that is dropped on the way through bytes would let two different devices look the same."""
    base = saved_form.saved(half_a_response().freeze())
    others: list[dict[str, Any]] = [
        {"completed": False}, {"statuses": (1, 2, 0, 0, 0)}, {"pending": 2}, {"buffer": bytes(96)}, {"transfer": None},
        {"registers": (1, *base.registers[1:])},
    ]  # fmt: skip
    assert base.transfer is not None
    for transfer in (
        replace(base.transfer, executor=0),
        replace(base.transfer, command=b"c"),
        replace(base.transfer, response=b"r"),
        replace(base.transfer, offset=1),
    ):
        others.append({"transfer": transfer})
    bodies = {saved_form.encode(replace(base, **change))[1] for change in others}
    assert len(bodies) == len(others)
    assert saved_form.encode(base)[1] not in bodies


# -- there and back
# --------------------------------------------------------------------------------------------------------------


@every_device
def test_frozen_and_thawed_as_if_nothing_had_happened(make: Maker) -> None:
    device = make()
    snapshot = device.freeze()
    version, body = saved_form.encode(saved_form.saved(snapshot))
    assert version == saved_form.VERSION == 3
    again = thaw(device.config, saved_form.decode(version, body))
    assert again.freeze() == snapshot
    assert again.executing == device.executing
    assert again.state is device.state
    for locality in range(device.config.localities):
        assert again.read(locality, 0, 0x1000) == device.read(locality, 0, 0x1000)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("make", OLD, ids=lambda make: make.__name__)
def test_what_older_versions_can_say(make: Maker, version: int) -> None:
    device = make()
    state = saved_form.saved(device.freeze())
    older = saved_form.lower(state, version)
    assert saved_form.encode(older)[0] == version
    assert saved_form.decode(*saved_form.encode(older)) == older
    assert saved_form.lift(older) == state
    assert thaw(device.config, older).freeze() == device.freeze()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("make", NEW, ids=lambda make: make.__name__)
def test_what_older_versions_cannot_say_is_refused(make: Maker, version: int) -> None:
    with pytest.raises(StateDamagedError, match="CRB registers"):
        saved_form.lower(saved_form.saved(make().freeze()), version)


@pytest.mark.parametrize("version", [1, 2])
def test_a_page_that_would_read_back_as_another_device_is_refused(version: int) -> None:
    several = CrbDevice(CrbConfig(localities=2, chunking=False))
    scribbled = executing()
    scribbled.write(0, 0x80, b"\xff" * 12)
    completed = CrbDevice(CrbConfig(localities=1, chunking=False))
    completed.submit(0, command())
    completed.complete(response())
    for device in (several, scribbled, completed):
        with pytest.raises(StateDamagedError, match=f"cannot be said in version {version}"):
            saved_form.lower(saved_form.saved(device.freeze()), version)


def test_the_newest_version_is_itself() -> None:
    state = saved_form.saved(half_a_response().freeze())
    assert saved_form.lower(state, 3) is state
    assert saved_form.lift(state) is state


def test_one_step_of_the_ladder_each() -> None:
    state = saved_form.saved(answered().freeze())
    first = saved_form.lower(state, 1)
    assert isinstance(first, CrbStateV1)
    second = saved_form.v1_to_v2(first)
    assert second == saved_form.lower(state, 2)
    assert saved_form.v2_to_v3(second) == state
    assert (len(first.registers), len(first.ram), len(second.page)) == (32, 3968, 4096)


def test_a_transfer_is_saved_only_while_one_is_under_way() -> None:
    assert saved_form.saved(answered().freeze()).transfer is None
    assert saved_form.saved(small_buffer().freeze()).transfer is None
    for make in (executing, half_a_command, half_a_response, seized_while_executing):
        assert saved_form.saved(make().freeze()).transfer is not None


def test_the_bounds_of_a_transfer_are_allowed() -> None:
    at_most = CrbDevice(CHUNKS)
    at_most.submit(0, command(300))
    answered_at_most = CrbDevice(CHUNKS)
    run(answered_at_most, answer=response(300))
    shortest = CrbDevice(CHUNKS)
    ready(shortest)
    fill_buffer(shortest, command(10))
    put(shortest, Offset.CTRL_START, NEXT)
    assert shortest.freeze().command == command(10)
    for device in (at_most, answered_at_most, shortest):
        assert thaw(CHUNKS, saved_form.saved(device.freeze())).freeze() == device.freeze()


def test_a_fatal_error_is_not_idleness() -> None:
    device = CrbDevice(CrbConfig())
    start(device)
    device.fail()
    assert thaw(CrbConfig(), saved_form.saved(device.freeze())).state is State.COMPLETION
    put(device, Offset.CTRL_REQ, 1)
    assert thaw(CrbConfig(), saved_form.saved(device.freeze())).state is State.READY


@pytest.mark.parametrize("version", [1, 2])
def test_a_command_that_says_more_than_the_buffer_goes_through_older_versions(version: int) -> None:
    device = CrbDevice(CrbConfig.qemu_7_2())
    start(device, b"\x80\x01\x01\0\0\0")
    state = saved_form.saved(device.freeze())
    assert saved_form.lift(saved_form.lower(state, version)) == state


@pytest.mark.parametrize("version", [1, 2])
def test_the_whole_buffer_goes_through_older_versions(version: int) -> None:
    device = CrbDevice(CrbConfig.qemu_7_2())
    run(device, answer=response(0xF80))
    state = saved_form.saved(device.freeze())
    assert saved_form.lift(saved_form.lower(state, version)) == state


def test_a_thawed_device_goes_on_in_the_middle_of_everything() -> None:
    device = thaw(CHUNKS, saved_form.saved(seized_while_executing().freeze()))
    assert device.executing is not None
    device.complete(response())
    assert device.active_locality == 3
    device = thaw(CHUNKS, saved_form.saved(half_a_response().freeze()))
    put(device, Offset.CTRL_START, NEXT)
    assert buffer_of(device, 58) == response(250)[192:]


# -- golden files
# ----------------------------------------------------------------------------------------------------------------


SUMS = {name: digest for digest, name in map(str.split, (GOLDEN / "SHA256SUMS").read_text().splitlines())}


@pytest.mark.parametrize("name", FILES)
def test_a_golden_file_still_means_what_it_meant(name: str) -> None:
    version, make = FILES[name]
    body = (GOLDEN / name).read_bytes()
    assert hashlib.sha256(body).hexdigest() == SUMS[name]
    device = make()
    state = saved_form.decode(version, body)
    assert saved_form.encode(state) == (version, body)
    assert thaw(device.config, state).freeze() == device.freeze()


def test_every_golden_file_is_tried() -> None:
    assert {path.name for path in GOLDEN.glob("*.bin")} == FILES.keys() == SUMS.keys()


# -- bytes that are no saved form
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [answered, half_a_response, separate_buffer], ids=lambda make: make.__name__)
def test_every_cut_and_every_excess_is_refused(make: Maker) -> None:
    state = saved_form.saved(make().freeze())
    forms = [saved_form.encode(state)]
    if make is answered:
        forms += [saved_form.encode(saved_form.lower(state, version)) for version in (1, 2)]
    for version, body in forms:
        for size in [*range(0, len(body), 7), len(body) - 1]:
            with pytest.raises(StateDamagedError, match="malformed"):
                saved_form.decode(version, body[:size])
        with pytest.raises(StateDamagedError, match="malformed"):
            saved_form.decode(version, body + b"\0")


@settings(max_examples=200, deadline=None)
@given(version=st.integers(1, 3), body=st.binary(max_size=300))
def test_hostile_bytes_raise_one_error(version: int, body: bytes) -> None:
    with pytest.raises(StateDamagedError):
        thaw(CHUNKS, saved_form.decode(version, body))


def test_versions_that_are_not_ours() -> None:
    with pytest.raises(StateNewerError, match="version 4"):
        saved_form.decode(4, b"")
    for version in (0, -1):
        with pytest.raises(StateDamagedError, match="never was"):
            saved_form.decode(version, b"")


def test_counts_are_capped_before_anything_is_taken() -> None:
    first = saved_form.encode(saved_form.lower(saved_form.saved(fresh().freeze()), 1))[1]
    name = first.index(b"tpm-crb-cmd")
    for broken, what in (
        (first.replace(b"tpm-crb-cmd", b"tpm-crb-mem"), "RAM block"),
        (first[: name + 11] + b"\xff\xff\xff\xff" + first[name + 15 :], "at most 3968"),
        (first[: name + 11] + b"\x10\0\0\0" + bytes(16), "has 16 bytes"),
    ):
        with pytest.raises(StateDamagedError, match=what):
            saved_form.decode(1, broken)
    third = saved_form.encode(saved_form.saved(fresh().freeze()))[1]
    for broken, what in ((b"\x04" + third[1:], "flags 0x4"), (third[:1] + b"\x06" + third[2:], "6 localities")):
        with pytest.raises(StateDamagedError, match=what):
            saved_form.decode(3, broken)


# -- pages that could never occur
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [CrbConfig(), CrbConfig.qemu_7_2(), CrbConfig.qemu_11()], ids=lambda c: c.dialect)
def test_a_bit_that_never_varies_names_its_register(config: CrbConfig) -> None:
    frozen = CrbDevice(config).freeze()
    masks = spec.varying_masks(config)
    for index in range(spec.WORDS):
        for bit in range(32):
            if not masks[index] >> bit & 1:
                words = list(frozen.words)
                words[index] ^= 1 << bit
                with pytest.raises(StateDamagedError, match=spec.register_at(index)):
                    CrbDevice.thaw(config, replace(frozen, words=tuple(words)))


def change(device: CrbDevice, **words: int) -> CrbSnapshot:
    """The device frozen, with some registers replaced."""
    frozen = device.freeze()
    changed = list(frozen.words)
    for name, value in words.items():
        changed[Offset[name] // 4] = value
    return replace(frozen, words=tuple(changed))


def refusals() -> dict[str, tuple[CrbConfig, CrbSnapshot, str]]:
    """Snapshots that no device gives, each with the register to be named."""
    five = CrbConfig()
    idle, busy, done = CrbDevice(five), CrbDevice(five), CrbDevice(five)
    busy.submit(0, command())
    done.submit(0, command())
    done.complete(response())
    taken_over = CrbDevice(five)
    taken_over.submit(1, command())
    put(taken_over, Offset.LOC_CTRL, 1, locality=4)
    at_rest, at_work, over = idle.freeze(), busy.freeze(), done.freeze()
    seized = seized_while_executing().freeze()
    half, old = half_a_command().freeze(), fresh().freeze()
    old_config = CrbConfig.qemu_7_2()
    return {
        "too few words": (five, replace(at_rest, words=at_rest.words[:-1]), "register file"),
        "too few localities": (five, replace(at_rest, statuses=(0,)), "LOC_STS"),
        "locality 5 of 5": (five, change(idle, LOC_STATE=0x81 | 5 << 2), "LOC_STATE"),
        "two values of LOC_STS": (five, replace(over, statuses=(0, 0, 0, 0, 0)), "LOC_STS"),
        "request of nobody": (five, replace(over, pending=1 << 5), "LOC_CTRL"),
        "negative requests": (five, replace(over, pending=-1), "LOC_CTRL"),
        "request not granted": (five, replace(at_rest, pending=1), "LOC_CTRL"),
        "request of the active": (five, replace(over, pending=1), "LOC_CTRL"),
        "granted to nobody": (five, replace(at_rest, statuses=(0, 1, 0, 0, 0)), "LOC_STS"),
        "assigned, not granted": (five, replace(change(idle, LOC_STATE=0x83)), "LOC_STS"),
        "reserved bit of LOC_STS": (five, replace(at_rest, statuses=(0, 4, 0, 0, 0)), "LOC_STS"),
        "the highest was seized": (five, replace(at_rest, statuses=(0, 0, 0, 0, 2)), "LOC_STS"),
        "seized and nobody waits": (CHUNKS, replace(seized, pending=0), "LOC_STS"),
        "seized by a lower one": (CHUNKS, replace(seized, pending=1), "LOC_STS"),
        "seized and not executing": (
            five,
            replace(change(done, LOC_STS=3), statuses=(3, 0, 0, 0, 0), pending=8),
            "LOC_STS",
        ),
        "start and idle": (five, change(busy, CTRL_STS=2), "CTRL_STS"),
        "start and nobody": (five, replace(at_work, executor=NOBODY), "CTRL_START"),
        "somebody and no start": (five, replace(over, executor=0), "CTRL_START"),
        "start of locality 5": (five, replace(at_work, executor=5), "CTRL_START"),
        "start of another": (five, replace(at_work, executor=1), "CTRL_START"),
        "start of nobody there": (five, replace(taken_over.freeze(), executor=5), "CTRL_START"),
        "completed and idle": (five, replace(at_rest, completed=True), "CTRL_STS"),
        "completed and executing": (five, replace(at_work, completed=True), "CTRL_STS"),
        "completed on QEMU": (old_config, replace(change(fresh(), CTRL_STS=0), completed=True), "CTRL_STS"),
        "a short buffer": (five, replace(at_rest, buffer=b""), "CMD_SIZE"),
        "a long command": (CHUNKS, replace(half, command=bytes(301)), "transfer"),
        "a long response": (five, replace(over, response=bytes(4097)), "transfer"),
        "a command in idle": (five, replace(at_rest, command=command()), "command"),
        "a command in completion": (five, replace(over, command=command(), response=b"", offset=0), "command"),
        "a command without chunks": (old_config, replace(old, command=command()), "command"),
        "a command shorter than a head": (CHUNKS, replace(half, command=bytes(9)), "command"),
        "a response in execution": (five, replace(at_work, response=response(), offset=1), "response"),
        "a response in idle": (five, replace(at_rest, response=response(), offset=1), "response"),
        "a response without chunks": (old_config, replace(old, response=response(), offset=1), "response"),
        "shown too much": (five, replace(over, offset=29), "response"),
        "shown less than nothing": (five, replace(over, offset=-1), "response"),
        "shown nothing": (five, replace(over, offset=0), "response"),
        "shown of nothing": (five, replace(at_rest, offset=1), "response"),
        "another configuration": (replace(five, revision=1), at_rest, "INTF_ID"),
        "another place": (replace(five, base=0x1000), at_rest, "CMD_LADDR"),
    }


@pytest.mark.parametrize(("config", "frozen", "register"), refusals().values(), ids=refusals().keys())
def test_a_snapshot_that_could_never_be(config: CrbConfig, frozen: CrbSnapshot, register: str) -> None:
    with pytest.raises(StateDamagedError, match=f"cannot be restored: (the )?{register} "):
        CrbDevice.thaw(config, frozen)


def test_start_of_another_is_right_where_locality_4_took_over() -> None:
    device = CrbDevice(CrbConfig())
    device.submit(1, command())
    put(device, Offset.LOC_CTRL, 1, locality=4)
    frozen = device.freeze()
    assert (frozen.owner, frozen.executor) == (4, 1)
    assert CrbDevice.thaw(CrbConfig(), frozen).freeze() == frozen


def test_pages_of_older_versions_that_could_never_be() -> None:
    page = bytearray(thaw(CrbConfig.qemu_7_2(), saved_form.saved(fresh().freeze())).read(0, 0, 0x1000))
    chunked = bytes(page[:0x31]) + bytes([page[0x31] | 0x04]) + bytes(page[0x32:])
    with pytest.raises(StateDamagedError, match="INTF_ID promises chunks"):
        saved_form.v2_to_v3(CrbStateV2(chunked))
    longer = bytes(page[:0x58]) + b"\x81\x0f" + bytes(page[0x5A:])
    with pytest.raises(StateDamagedError, match="CMD_SIZE is 0xf81"):
        saved_form.v2_to_v3(CrbStateV2(longer))
    shorter = bytes(page[:0x58]) + b"\x00\x02\0\0" + bytes(page[0x5C:-1]) + b"\x01"
    with pytest.raises(StateDamagedError, match="CMD_SIZE is 0x200"):
        saved_form.v2_to_v3(CrbStateV2(shorter))
    at = Offset.LOC_STS
    for status, refused in ((0xFF, False), (0x100, True), (1 << 31, True)):
        odd = CrbStateV2(bytes(page[:at]) + status.to_bytes(4, "little") + bytes(page[at + 4 :]))
        if refused:
            with pytest.raises(StateDamagedError, match=f"LOC_STS is {status:#x}"):
                saved_form.v2_to_v3(odd)
        else:
            assert saved_form.v2_to_v3(odd).statuses == (status,)


def test_a_device_that_can_be_moved_is_where_it_was_saved() -> None:
    device = separate_buffer()
    device.relocate(0x12_0000_0000)
    assert word(device, Offset.CMD_HADDR, 1) == 0x12
    assert word(device, Offset.RSP_ADDR, 1) == 0x2000
    again = thaw(separate_buffer().config, saved_form.saved(device.freeze()))
    assert again.config.base == 0x12_0000_0000
    assert again.freeze() == device.freeze()
    for low in (0x2001, 0x1000):
        words = list(device.freeze().words)
        words[Offset.CMD_LADDR // 4] = low
        words[Offset.CMD_HADDR // 4] = 0
        snapshot = replace(device.freeze(), words=tuple(words))
        with pytest.raises(StateDamagedError, match="CMD_LADDR"):
            CrbDevice.thaw(device.config, snapshot, memoryview(bytearray(128)))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_accepted_lives(data: st.DataObject) -> None:
    """A snapshot with anything in it is refused, or is one that a device really gives back, whatever happens next."""
    make = data.draw(st.sampled_from([five_localities, half_a_command, half_a_response, seized_while_executing]))
    device = make()
    config, frozen = device.config, device.freeze()
    words = list(frozen.words)
    for index, mask in enumerate(spec.varying_masks(config)):
        if mask and data.draw(st.booleans()):
            words[index] = words[index] & ~mask | data.draw(st.integers(0, mask)) & mask
    statuses = tuple(data.draw(st.sampled_from([status, 0, 1, 2, 3])) for status in frozen.statuses)
    owner = words[0] >> 2 & 7
    if owner < 5 and data.draw(st.booleans()):
        words[Offset.LOC_STS // 4] = statuses[owner]
    wild = replace(
        frozen,
        words=tuple(words),
        statuses=statuses,
        pending=data.draw(st.sampled_from([frozen.pending, 0, 1, 8, 9, 31])),
        completed=data.draw(st.booleans()),
        executor=data.draw(st.sampled_from([frozen.executor, -1, 0, 1, 3])),
        command=data.draw(st.sampled_from([frozen.command, b"", command()])),
        response=data.draw(st.sampled_from([frozen.response, b"", response(200)])),
        offset=data.draw(st.sampled_from([frozen.offset, -1, 0, 1, 96, 150, 300])),
    )
    try:
        alive = CrbDevice.thaw(config, wild)
    except StateDamagedError:
        return
    assert alive.freeze() == wild
    for action in data.draw(st.lists(actions(config), max_size=8)):
        act(alive, action, alive.write)
        assert CrbDevice.thaw(config, alive.freeze()).freeze() == alive.freeze()


def test_states_are_told_by_registers_and_one_flag() -> None:
    seen = {make().freeze().state for make in (*OLD, *NEW)}
    assert seen == {State.IDLE, State.READY, State.EXECUTION, State.COMPLETION}


def test_a_live_buffer_is_left_as_the_guest_has_it() -> None:
    """Memory that a guest writes while its device is frozen: what it wrote is newer than the snapshot."""
    config = CrbConfig(localities=1, separate_buffer=True)
    memory = memoryview(bytearray(config.buffer_size))
    device = CrbDevice(config, memory)
    memory[:4] = b"old."
    snapshot = device.freeze()
    memory[:4] = b"new."
    assert bytes(CrbDevice.thaw(config, snapshot, memory, live=True).buffer[:4]) == b"new."
    assert bytes(CrbDevice.thaw(config, snapshot, memory).buffer[:4]) == b"old."
