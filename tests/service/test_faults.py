"""Faults as they are written, and as they come about."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crbd.errors import UsageError
from crbd.service.faults import (
    Action,
    Answer,
    Delay,
    FailureMode,
    Fault,
    FaultPlan,
    Reset,
    WriteError,
    parse_faults,
)
from crbd.tpm.names import COMMANDS, RESPONSES, command_named, name_of_command, response_named

GET_RANDOM, PCR_EXTEND, NV_WRITE, STARTUP, SHUTDOWN, COMMIT = 0x17B, 0x182, 0x137, 0x144, 0x145, 0x18B

WRITTEN: list[tuple[str, int | str, Action, int, int | None]] = [
    ("GetRandom=retry", GET_RANDOM, Answer(0x922), 1, None),
    ("GetRandom:2=retry", GET_RANDOM, Answer(0x922), 2, 2),
    ("GetRandom:2+=retry", GET_RANDOM, Answer(0x922), 2, None),
    ("GetRandom:2-4=retry", GET_RANDOM, Answer(0x922), 2, 4),
    ("TPM2_PCR_Extend=TPM_RC_LOCKOUT", PCR_EXTEND, Answer(0x921), 1, None),
    ("nv_write=nv-rate", NV_WRITE, Answer(0x920), 1, None),
    ("0x17b = rc:0x9a2", GET_RANDOM, Answer(0x9A2), 1, None),
    ("0x20001000=rc:257", 0x20001000, Answer(257), 1, None),
    ("*:1=failure-mode", "*", FailureMode(), 1, 1),
    ("*=failure", "*", Answer(0x101), 1, None),
    ("GetRandom=delay:250ms", GET_RANDOM, Delay(0.25), 1, None),
    ("GetRandom=delay:1.5s", GET_RANDOM, Delay(1.5), 1, None),
    ("GetRandom=reset", GET_RANDOM, Reset(started=True), 1, None),
    ("GetRandom=power-cut", GET_RANDOM, Reset(started=False), 1, None),
    ("store:3=enospc", "store", WriteError(errno.ENOSPC), 3, 3),
    ("store=eio", "store", WriteError(errno.EIO), 1, None),
    ("Commit=retry", COMMIT, Answer(0x922), 1, None),
]


@pytest.mark.parametrize(("text", "target", "action", "first", "last"), WRITTEN, ids=[row[0] for row in WRITTEN])
def test_what_is_written(text: str, target: int | str, action: Action, first: int, last: int | None) -> None:
    (fault,) = parse_faults(text, "--faults")
    assert (fault.target, fault.action, fault.first, fault.last) == (target, action, first, last)
    assert fault.text == text


def test_several_on_lines_and_with_semicolons() -> None:
    text = "# two of one kind\nGetRandom:1=retry; GetRandom:3=retry\n\n  PCR_Extend=lockout;\n"
    assert [fault.text for fault in parse_faults(text, "file")] == [
        "GetRandom:1=retry",
        "GetRandom:3=retry",
        "PCR_Extend=lockout",
    ]
    assert parse_faults("", "--faults") == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("GetRandom", "is no fault"),
        ("GetRandom:=retry", "is no fault"),
        ("GetRandom:1=", "is no fault"),
        ("GetRandom:0=retry", "never happens"),
        ("GetRandom:3-2=retry", "never happens"),
        ("GetRandon=retry", "no TPM command 'GetRandon'"),
        ("0xzz=retry", "no TPM command"),
        ("0x100000000=retry", "no TPM command"),
        ("GetRandom=retrx", "no action 'retrx'"),
        ("GetRandom=rc:0", "no action 'rc:0'"),
        ("GetRandom=rc:x", "no action"),
        ("GetRandom=delay:5", "no action"),
        ("GetRandom=delay:2h", "no action"),
        ("GetRandom=delay:3601s", "too long"),
        ("GetRandom=reset:1", "no action"),
        ("GetRandom=enospc", "cannot be"),
        ("store=retry", "cannot be"),
    ],
)
def test_what_makes_no_sense_is_said(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"^--faults: ") as caught:
        parse_faults(text, "--faults")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^faults\.txt, line 3: "):
        parse_faults(f"#\nGetRandom=retry\n{text}\n", "faults.txt")


@given(st.text(max_size=60))
def test_any_text_is_faults_or_an_error(text: str) -> None:
    try:
        faults = parse_faults(text, "file")
    except UsageError:
        return
    assert all(fault.first >= 1 for fault in faults)


def struck(plan: FaultPlan, *codes: int) -> list[list[str]]:
    return [[fault.text for fault in plan.of_command(code)] for code in codes]


def plan(text: str) -> FaultPlan:
    return FaultPlan(parse_faults(text, "test"))


def test_each_counts_what_concerns_it() -> None:
    two = plan("GetRandom:2=retry;PCR_Extend:1-2=lockout;*:4+=failure")
    first, later, every = "GetRandom:2=retry", "PCR_Extend:1-2=lockout", "*:4+=failure"
    codes = (GET_RANDOM, PCR_EXTEND, GET_RANDOM, PCR_EXTEND, PCR_EXTEND)
    assert struck(two, *codes) == [[], [later], [first], [later, every], [every]]
    assert two.struck == 5


def test_every_command_is_not_those_that_crbd_sends() -> None:
    every = plan("*=retry")
    assert struck(every, STARTUP, SHUTDOWN, 0x20001000) == [[], [], ["*=retry"]]
    named = plan("Startup:1=retry")
    assert struck(named, STARTUP) == [["Startup:1=retry"]]


def test_new_faults_are_counted_anew() -> None:
    changing = plan("GetRandom:1=retry")
    assert struck(changing, GET_RANDOM, GET_RANDOM) == [["GetRandom:1=retry"], []]
    changing.replace(parse_faults("GetRandom:1=lockout", "test"))
    assert changing.struck == 0
    assert struck(changing, GET_RANDOM) == [["GetRandom:1=lockout"]]
    changing.replace(())
    assert struck(changing, GET_RANDOM) == [[]]


def test_writes_are_counted_by_themselves() -> None:
    writes = plan("store:2=enospc;*=retry")
    assert writes.of_store() is None
    assert writes.of_store() == WriteError(errno.ENOSPC)
    assert writes.of_store() is None
    assert writes.struck == 1


def test_names_there_and_back() -> None:
    for name, code in COMMANDS.items():
        assert command_named(name.upper()) == command_named(f"TPM2_{name}") == code
        assert command_named(name_of_command(code)) == code
    assert name_of_command(0x20001000) == "0x20001000"
    for name, code in RESPONSES.items():
        assert response_named(name.lower().replace("_", "-")) == response_named(f"TPM_RC_{name}") == code
    assert len(set(RESPONSES.values())) == len(RESPONSES)
    assert isinstance(parse_faults("Commit=retry", "")[0], Fault)
