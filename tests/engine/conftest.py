"""Engines to test: every contract test runs against the fake and against libtpms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.faults import FaultPlan
from crbd.service.injection import FaultyEngine
from crbd.state.kinds import StateKind


class MemoryStatePort:
    """State in memory. `stores` is what was stored; the errors, where set, are raised (by loads of one kind alone)."""

    def __init__(self) -> None:
        self.states: dict[StateKind, bytes] = {}
        self.stores: list[StateKind] = []
        self.load_error: BaseException | None = None
        self.load_error_kind = StateKind.PERMANENT
        self.store_error: BaseException | None = None

    def load(self, kind: StateKind) -> bytes | None:
        if self.load_error is not None and kind is self.load_error_kind:
            raise self.load_error
        return self.states.get(kind)

    def store(self, kind: StateKind, data: bytes) -> None:
        if self.store_error is not None:
            raise self.store_error
        assert type(data) is bytes
        self.stores.append(kind)
        self.states[kind] = data

    def delete(self, kind: StateKind) -> None:
        self.states.pop(kind, None)


EngineFactory = Callable[[StatePort], Engine]


@pytest.fixture(params=["fake", "libtpms", "no faults"])
def engine_factory(request: pytest.FixtureRequest) -> Iterator[EngineFactory]:
    """Makes engines for a port. A new one closes the one before: libtpms allows one at a time."""
    with ExitStack() as stack:

        def make(port: StatePort) -> Engine:
            stack.close()
            engine: Engine = LibtpmsEngine(port) if request.param == "libtpms" else FakeEngine(port)
            if request.param == "no faults":
                engine = FaultyEngine(engine, port, FaultPlan())
            stack.callback(engine.close)
            return engine

        yield make


@pytest.fixture
def port() -> MemoryStatePort:
    return MemoryStatePort()


@pytest.fixture
def engine(engine_factory: EngineFactory, port: MemoryStatePort) -> Engine:
    """An engine that is off, with nothing stored."""
    return engine_factory(port)


@pytest.fixture
def libtpms(port: MemoryStatePort) -> Iterator[LibtpmsEngine]:
    """The real engine, off, with nothing stored."""
    engine = LibtpmsEngine(port)
    yield engine
    engine.close()
