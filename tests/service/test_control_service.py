"""Every control request has its answer, and no order of them raises."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from crbd.control import messages as m
from crbd.control.spec import COMMANDS
from crbd.engine.fake import FakeEngine
from crbd.service.control import ControlService
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.store.memory import MemoryStore

numbers = st.one_of(st.integers(0, 5), st.integers(0, 0xFFFFFFFF))
BARE: list[m.Request] = [
    m.GetCapability(),
    m.Shutdown(),
    m.GetTpmEstablished(),
    m.HashStart(),
    m.HashEnd(),
    m.CancelTpmCmd(),
    m.StoreVolatile(),
    m.Stop(),
    m.GetConfig(),
    m.GetRegisters(),
    m.TakeSnapshot(),
]
requests = st.one_of(
    st.sampled_from(BARE),
    st.builds(m.Init, st.sampled_from([m.InitFlag(0), m.InitFlag.DELETE_VOLATILE])),
    st.builds(m.SetLocality, st.integers(0, 255)),
    st.builds(m.ResetTpmEstablished, st.integers(0, 255)),
    st.builds(m.HashData, st.binary(max_size=5000)),
    st.builds(m.GetStateBlob, st.sampled_from(list(m.StateFlag)), numbers, numbers),
    st.builds(m.SetStateBlob, st.sampled_from(list(m.StateFlag)), numbers, st.binary(max_size=40)),
    st.builds(m.SetBufferSize, numbers),
    st.builds(m.GetInfo, numbers, numbers),
    st.builds(m.LockStorage, st.integers(0, 3)),
    st.builds(m.Restore, st.sampled_from([m.RestoreFlag(0), m.RestoreFlag(1)]), st.binary(max_size=40)),
)


@given(st.lists(requests, max_size=20))
def test_any_order_is_answered(sequence: list[m.Request]) -> None:
    instance = Instance(FakeEngine, MemoryStore(), InstanceOptions(may_manufacture=True))
    service = ControlService(instance)
    for request in sequence:
        reply = service.answer(request)
        assert len(m.encode_reply(reply)) >= 4
    assert isinstance(service.answer(m.Init(m.InitFlag(0))), m.Done)
    instance.close()


def test_the_strategy_above_knows_every_command() -> None:
    covered = {m.Init, m.SetLocality, m.ResetTpmEstablished, m.HashData, m.GetStateBlob, m.SetStateBlob}
    covered |= {m.SetBufferSize, m.GetInfo, m.LockStorage, m.Restore}
    covered |= {m.SetDataFd, m.Upgrade}  # the server's
    covered |= {type(request) for request in BARE}
    assert covered == {command.request for command in COMMANDS}
