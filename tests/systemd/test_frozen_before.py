"""What has to be written back when a TPM goes on that was shut down since."""

from __future__ import annotations

from dataclasses import replace

from crbd.engine.fake import FakeEngine
from crbd.server.fdstore import at_rest, frozen_before
from crbd.service.frozen import document_of
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions, Startup
from crbd.state.handover import NAME, Handover, decode, encode
from crbd.state.kinds import StateKind
from crbd.store.memory import MemoryStore
from tests.engine import commands as c


def test_the_state_of_before_the_shutdown_is_written_back() -> None:
    """By crbd itself: that libtpms, and the fake one with it, stores its state when it starts is nothing to rely on."""
    options = InstanceOptions(startup=Startup.CLEAR, may_manufacture=True)
    store = MemoryStore()
    running = Instance(FakeEngine, store, options)
    running.begin()
    assert c.code(running.execute(c.nv_define(8))) == c.SUCCESS
    frozen = running.freeze()
    before = frozen.states[StateKind.PERMANENT]
    running.lay_down()
    resting = store.load(StateKind.PERMANENT)
    assert resting != before, "it was shut down"
    handover = Handover(1, 0, "crbd", document_of(frozen, "crbd"), frozen.facts, at_rest=at_rest(store))
    left = decode(encode(handover), {})
    assert left == handover
    following = MemoryStore(store.estate().held)
    assert at_rest(following) == left.at_rest
    assert frozen_before(left).changed == {StateKind.PERMANENT: before}
    instance = Instance(FakeEngine, following, options)
    instance.thaw(frozen_before(left), NAME)
    instance.make_durable()
    assert following.load(StateKind.PERMANENT) == before
    assert at_rest(following) != left.at_rest, "and the same handover is stale from now on"
    assert not frozen_before(replace(left, at_rest=b"")).changed, "an upgrade has shut nothing down"
    instance.close()
    running.close()
