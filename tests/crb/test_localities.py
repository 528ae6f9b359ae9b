"""Who has the TPM: request, relinquish, seize, and what a locality sees of another's business.

PTP, sections on locality arbitration and tables "TPM_LOC_STATE_x", "TPM_LOC_CTRL_x", "TPM_LOC_CTRL_4", "TPM_LOC_STS_x".
"""

from __future__ import annotations

import pytest

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Cancel, Execute, HashData, HashEnd, HashStart, ResetEstablished
from crbd.crb.spec import Offset
from crbd.crb.states import State

from .driver import (
    CMD_READY,
    HASH_DATA,
    HASH_END,
    HASH_START,
    RELINQUISH,
    REQUEST_ACCESS,
    RESET_ESTABLISHMENT,
    SEIZE,
    START,
    buffer_of,
    command,
    fill_buffer,
    put,
    response,
    run,
    start,
    word,
)

GRANTED, SEIZED = 1, 2


@pytest.fixture
def device() -> CrbDevice:
    return CrbDevice(CrbConfig())


def request(device: CrbDevice, locality: int) -> None:
    assert put(device, Offset.LOC_CTRL, REQUEST_ACCESS, locality) == ()


def relinquish(device: CrbDevice, locality: int) -> None:
    assert put(device, Offset.LOC_CTRL, RELINQUISH, locality) == ()


def active(device: CrbDevice) -> int | None:
    return device.active_locality


def statuses(device: CrbDevice) -> list[int]:
    return [word(device, Offset.LOC_STS, locality) for locality in range(device.config.localities)]


def state_word(device: CrbDevice) -> int:
    """LOC_STATE, which is the same on every page."""
    words = {word(device, Offset.LOC_STATE, locality) for locality in range(device.config.localities)}
    assert len(words) == 1
    return words.pop()


def test_request_and_relinquish(device: CrbDevice) -> None:
    assert (state_word(device), active(device)) == (0x81, None)
    request(device, 2)
    assert (state_word(device), active(device)) == (0x81 | 0x02 | 2 << 2, 2)
    assert statuses(device) == [0, 0, GRANTED, 0, 0]
    relinquish(device, 2)
    assert (state_word(device), active(device)) == (0x81 | 2 << 2, None)
    assert statuses(device) == [0] * 5


def test_asking_twice_changes_nothing(device: CrbDevice) -> None:
    request(device, 1)
    before = device.freeze()
    request(device, 1)
    assert device.freeze() == before


def test_who_waits_gets_it_the_highest_first(device: CrbDevice) -> None:
    request(device, 0)
    for locality in (1, 3, 2):
        request(device, locality)
    assert statuses(device) == [GRANTED, 0, 0, 0, 0]
    for previous, locality in ((0, 3), (3, 2), (2, 1)):
        relinquish(device, previous)
        assert active(device) == locality
        assert statuses(device)[locality] == GRANTED
    relinquish(device, 1)
    assert active(device) is None
    assert device.freeze().pending == 0


def test_a_request_can_be_withdrawn(device: CrbDevice) -> None:
    request(device, 0)
    request(device, 3)
    relinquish(device, 3)
    relinquish(device, 0)
    assert active(device) is None
    relinquish(device, 3)
    assert statuses(device) == [0] * 5


def test_relinquishing_what_one_has_not(device: CrbDevice) -> None:
    request(device, 1)
    before = device.freeze()
    relinquish(device, 0)
    relinquish(device, 3)
    assert device.freeze() == before


@pytest.mark.parametrize(("holder", "seizing", "taken"), [(0, 1, True), (2, 3, True), (1, 1, False), (3, 0, False)])
def test_seize(device: CrbDevice, holder: int, seizing: int, taken: bool) -> None:
    """TPM_LOC_CTRL_x.Seize: to the higher priority locality, which is the higher number."""
    request(device, holder)
    assert put(device, Offset.LOC_CTRL, SEIZE, seizing) == ()
    assert active(device) == (seizing if taken else holder)
    expected = [0] * 5
    if taken:
        expected[holder] = SEIZED
    expected[seizing if taken else holder] = GRANTED
    assert statuses(device) == expected


def test_been_seized_until_one_has_it_again(device: CrbDevice) -> None:
    request(device, 0)
    put(device, Offset.LOC_CTRL, SEIZE, 2)
    request(device, 0)
    assert statuses(device) == [SEIZED, 0, GRANTED, 0, 0]
    relinquish(device, 2)
    assert statuses(device) == [GRANTED, 0, 0, 0, 0]


def test_seizing_a_free_tpm_is_a_request(device: CrbDevice) -> None:
    put(device, Offset.LOC_CTRL, SEIZE, 1)
    assert active(device) == 1
    assert statuses(device) == [0, GRANTED, 0, 0, 0]


def test_one_locality_has_nothing_to_seize() -> None:
    """QEMU: locality."""
    for config in (CrbConfig(localities=1), CrbConfig.qemu_11()):
        device = CrbDevice(config)
        before = device.freeze()
        assert put(device, Offset.LOC_CTRL, SEIZE) == ()
        assert device.freeze() == before


def test_seize_while_a_command_executes(device: CrbDevice) -> None:
    """The command is cancelled; the TPM changes hands when it is over, and its response is thrown away."""
    start(device)
    assert put(device, Offset.LOC_CTRL, SEIZE, 3) == (Cancel(),)
    assert (active(device), statuses(device)) == (0, [GRANTED | SEIZED, 0, 0, 0, 0])
    device.complete(response())
    assert (active(device), statuses(device)) == (3, [SEIZED, 0, 0, GRANTED, 0])
    assert not any(buffer_of(device, locality=0))
    assert not any(buffer_of(device, locality=3))
    assert (device.state, device.freeze().response) == (State.IDLE, b"")


def test_the_seized_asks_again_before_it_is_over(device: CrbDevice) -> None:
    start(device)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    request(device, 0)
    assert statuses(device)[0] == GRANTED | SEIZED
    device.fail()
    assert active(device) == 3
    assert word(device, Offset.CTRL_STS, 3) == 3
    relinquish(device, 3)
    assert active(device) == 0


def test_the_seized_gives_up_before_it_is_over(device: CrbDevice) -> None:
    start(device)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    relinquish(device, 0)
    assert (active(device), statuses(device)) == (None, [0] * 5)
    device.complete(response())
    assert (active(device), statuses(device)) == (3, [0, 0, 0, GRANTED, 0])


def test_a_seize_withdrawn_before_it_takes_effect(device: CrbDevice) -> None:
    start(device)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    put(device, Offset.LOC_CTRL, SEIZE, 2)
    request(device, 0)
    relinquish(device, 3)
    assert statuses(device)[0] == GRANTED | SEIZED
    relinquish(device, 2)
    assert statuses(device)[0] == GRANTED
    assert device.freeze().pending == 0
    device.complete(response())
    assert buffer_of(device, 28) == response()


def test_one_of_two_seizes_withdrawn(device: CrbDevice) -> None:
    start(device)
    for locality in (1, 3):
        put(device, Offset.LOC_CTRL, SEIZE, locality)
    relinquish(device, 3)
    assert statuses(device)[0] == GRANTED | SEIZED
    assert CrbDevice.thaw(device.config, device.freeze()).freeze() == device.freeze()
    device.complete(response())
    assert statuses(device) == [SEIZED, GRANTED, 0, 0, 0]


def test_nobody_seizes_from_itself(device: CrbDevice) -> None:
    start(device, locality=2)
    before = device.freeze()
    for locality in (2, 0):
        assert put(device, Offset.LOC_CTRL, SEIZE, locality) == ()
    assert device.freeze() == before


def test_a_lower_request_does_not_keep_a_withdrawn_seize(device: CrbDevice) -> None:
    start(device, locality=1)
    put(device, Offset.LOC_CTRL, SEIZE, 3)
    request(device, 0)
    relinquish(device, 3)
    assert statuses(device) == [0, GRANTED, 0, 0, 0]
    device.complete(response())
    assert active(device) == 1
    relinquish(device, 1)
    assert active(device) == 0


def test_a_relinquished_command_goes_on(device: CrbDevice) -> None:
    """QEMU: accesses-in-execution; another locality gets the TPM when it is over."""
    start(device)
    relinquish(device, 0)
    request(device, 1)
    assert put(device, Offset.LOC_CTRL, SEIZE, 2) == ()
    assert active(device) is None
    request(device, 0)
    assert active(device) == 0
    relinquish(device, 0)
    device.complete(response())
    assert active(device) == 2
    relinquish(device, 2)
    assert active(device) == 1


def test_the_same_locality_finds_its_response_again(device: CrbDevice) -> None:
    run(device)
    relinquish(device, 0)
    request(device, 0)
    assert buffer_of(device, 28) == response()
    assert device.state is State.COMPLETION


def test_another_locality_finds_nothing(device: CrbDevice) -> None:
    run(device)
    put(device, Offset.INT_ENABLE, 0x1F)
    put(device, Offset.CTRL_CANCEL, 1)
    relinquish(device, 0)
    request(device, 1)
    for locality in (0, 1):
        page = device.read(locality, 0x10, 0x1000 - 0x10)
        assert page == CrbDevice(CrbConfig()).read(locality, 0x10, 0x1000 - 0x10)
    assert (device.freeze().response, device.freeze().command) == (b"", b"")


def test_tpm_sts_is_of_the_tpm(device: CrbDevice) -> None:
    start(device)
    device.fail()
    relinquish(device, 0)
    request(device, 2)
    assert word(device, Offset.CTRL_STS, 2) == 3
    assert word(device, Offset.CTRL_STS, 0) == 2


def test_control_area_and_buffer_obey_their_owner_alone(device: CrbDevice) -> None:
    request(device, 1)
    before = device.freeze()
    for locality in (0, 2, 3, 4):
        for offset in (Offset.CTRL_REQ, Offset.CTRL_CANCEL, Offset.CTRL_START, Offset.INT_ENABLE):
            assert put(device, offset, 1, locality) == ()
        fill_buffer(device, b"\xee" * 16, locality)
        assert not any(buffer_of(device, locality=locality))
    assert device.freeze() == before
    put(device, Offset.CTRL_REQ, CMD_READY, 1)
    fill_buffer(device, command(), 1)
    for locality in (0, 2):
        assert put(device, Offset.CTRL_START, START, locality) == ()
    assert put(device, Offset.CTRL_START, START, 1) == (Execute(command(), 1),)
    for locality in (0, 2):
        assert put(device, Offset.CTRL_CANCEL, 1, locality) == ()
    assert put(device, Offset.CTRL_CANCEL, 1, 1) == (Cancel(),)


@pytest.mark.parametrize("locality", range(5))
def test_reset_establishment_from_3_and_4_only(device: CrbDevice, locality: int) -> None:
    """TPM_LOC_CTRL_x.resetEstablishmentBit; the flag itself is the engine's."""
    effects = put(device, Offset.LOC_CTRL, RESET_ESTABLISHMENT, locality)
    assert effects == ((ResetEstablished(locality),) if locality >= 3 else ())


def test_a_reset_gives_the_control_area_back_to_locality_0(device: CrbDevice) -> None:
    """PTP, section on _TPM_Init: no locality is active."""
    request(device, 1)
    start(device, locality=3)
    device.reset()
    assert device.freeze() == CrbDevice(CrbConfig()).freeze()
    assert start(device) == (Execute(command(), 0),)
    assert word(device, Offset.CTRL_START, 0) == 1


def test_established(device: CrbDevice) -> None:
    """TPM_LOC_STATE_x.tpmEstablished is 0 where the flag is set; on every page, through localities and resets."""
    device.set_established(True)
    assert state_word(device) == 0x80
    request(device, 3)
    assert state_word(device) == 0x82 | 3 << 2
    device.reset()
    assert state_word(device) == 0x80
    device.set_established(False)
    assert state_word(device) == 0x81


# -- the locality-4 hash sequence
# -------------------------------------------------------------------------------------------------


def counted(data: bytes) -> bytes:
    return len(data).to_bytes(2, "little") + data


def test_hash_sequence_as_getsec_senter_does_it(device: CrbDevice) -> None:
    """Intel SDM volume 2, GETSEC[SENTER]: HASH_START, one filled buffer, HASH_DATA and HASH_END in one write."""
    assert put(device, Offset.LOC_CTRL, HASH_START, 4) == (HashStart(),)
    assert active(device) == 4
    fill_buffer(device, counted(b"measured"), 4)
    assert put(device, Offset.LOC_CTRL, HASH_DATA | HASH_END, 4) == (HashData(b"measured"), HashEnd())
    assert active(device) is None
    device.set_established(True)
    assert state_word(device) & 1 == 0


def test_hash_data_piece_by_piece(device: CrbDevice) -> None:
    put(device, Offset.LOC_CTRL, HASH_START, 4)
    for piece in (b"one", b"", b"x" * 0xF7E):
        fill_buffer(device, counted(piece), 4)
        assert put(device, Offset.LOC_CTRL, HASH_DATA, 4) == (HashData(piece),)
    fill_buffer(device, b"\xff\xff", 4)
    (too_much,) = put(device, Offset.LOC_CTRL, HASH_DATA, 4)
    assert too_much == HashData(b"x" * 0xF7E)
    assert put(device, Offset.LOC_CTRL, HASH_END | RESET_ESTABLISHMENT, 4) == (HashEnd(), ResetEstablished(4))


def test_hash_data_and_end_without_a_start(device: CrbDevice) -> None:
    before = device.freeze()
    assert put(device, Offset.LOC_CTRL, HASH_DATA | HASH_END | 0xF0, 4) == ()
    assert device.freeze() == before


def test_hash_start_takes_the_tpm_from_its_locality(device: CrbDevice) -> None:
    request(device, 2)
    request(device, 1)
    assert put(device, Offset.LOC_CTRL, HASH_START, 4) == (HashStart(),)
    assert statuses(device) == [0, 0, SEIZED, 0, GRANTED]
    before = device.freeze()
    assert put(device, Offset.LOC_CTRL, HASH_START, 4) == (HashStart(),)
    assert device.freeze() == before
    assert put(device, Offset.LOC_CTRL, HASH_END, 4) == (HashEnd(),)
    assert active(device) == 1


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_hash_start_while_a_command_executes(device: CrbDevice, end: str) -> None:
    """The TPM is locality 4's at once; the command's answer is nobody's, and until then nobody else gets the TPM."""
    start(device)
    assert put(device, Offset.LOC_CTRL, HASH_START, 4) == (Cancel(), HashStart())
    assert (word(device, Offset.CTRL_START, 4), word(device, Offset.CTRL_START, 0)) == (1, 0)
    assert put(device, Offset.CTRL_CANCEL, 1, 4) == (Cancel(),)
    fill_buffer(device, counted(b"abc"), 4)
    assert put(device, Offset.LOC_CTRL, HASH_DATA | HASH_END, 4) == (HashData(b"abc"), HashEnd())
    request(device, 0)
    assert active(device) is None
    if end == "complete":
        device.complete(response())
    else:
        device.fail()
    assert (active(device), device.state, device.executing) == (0, State.IDLE, None)
    assert not any(buffer_of(device))
    assert word(device, Offset.CTRL_STS) == (2 if end == "complete" else 3)


def test_locality_4_is_there_only_with_five() -> None:
    device = CrbDevice(CrbConfig(localities=4))
    with pytest.raises(ValueError, match="in no page"):
        put(device, Offset.LOC_CTRL, HASH_START, 4)
