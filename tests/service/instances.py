"""Instances to test: on a store that can fail, with the fake TPM in sight, or with libtpms."""

from __future__ import annotations

from crbd.engine.fake import FakeEngine
from crbd.engine.libtpms import LibtpmsEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.tpm.head import response_code
from tests.engine import commands as c

from .failing_store import FailingStore

CREATE = InstanceOptions(may_manufacture=True)


class Bench:
    """An instance on a store that can fail, with the fake TPM in sight."""

    def __init__(self, options: InstanceOptions = CREATE, store: FailingStore | None = None) -> None:
        self.store = store or FailingStore()
        self.engines: list[FakeEngine] = []
        self.instance = Instance(self._make, self.store, options)

    def _make(self, port: StatePort) -> Engine:
        self.engines.append(FakeEngine(port))
        return self.engines[-1]

    @property
    def engine(self) -> FakeEngine:
        return self.engines[-1]

    def run(self, command: bytes, locality: int | None = None) -> int:
        code = response_code(self.instance.execute(command, locality))
        assert code is not None
        return code

    def started(self) -> Bench:
        self.instance.init(delete_volatile=False)
        assert self.run(c.STARTUP_CLEAR) == c.SUCCESS
        return self

    @property
    def executed(self) -> list[bytes]:
        return [entry.command for entry in self.engine.log]


class Real:
    """An instance with libtpms behind it."""

    def __init__(self, options: InstanceOptions = CREATE) -> None:
        self.store = FailingStore()
        self.instance = Instance(LibtpmsEngine, self.store, options)

    def run(self, command: bytes) -> bytes:
        return self.instance.execute(command)
