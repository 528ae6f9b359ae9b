"""Storage that two instances share, each with an opening of its own, as two hosts would.

Neither waits for the other's lock: both live in one thread.
"""

from __future__ import annotations

import resource
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from crbd.engine.fake import FakeEngine
from crbd.engine.port import Engine, StatePort
from crbd.service.instance import Instance
from crbd.service.options import InstanceOptions
from crbd.store.layout import Layout, open_state
from crbd.store.port import Store

IN_MEMORY = Path("/dev/shm")
"""Where files cost no disk."""

MakeEngine = Callable[[StatePort], Engine]


@contextmanager
def directory() -> Iterator[Path]:
    """A directory for TPM state, which goes away."""
    with tempfile.TemporaryDirectory(prefix="crbd-", dir=IN_MEMORY if IN_MEMORY.is_dir() else None) as name:
        yield Path(name)


def opened(path: Path, layout: Layout, *, incoming: bool = False) -> Store:
    """An opening of the state at `path`; a destination's is not locked."""
    where = path / "state" if layout is Layout.LINEAR else path
    return open_state(where, create=True, layout=layout, lock=not incoming)


def source_at(path: Path, layout: Layout = Layout.CRBD, make: MakeEngine = FakeEngine) -> Instance:
    """A running TPM, made at `path` if there is none, that hands its lock over."""
    options = InstanceOptions(may_manufacture=True, release_lock_outgoing=True, lock_retries=1)
    instance = Instance(make, opened(path, layout), options)
    instance.check()
    instance.init(delete_volatile=False)
    return instance


def destination_at(path: Path, layout: Layout = Layout.CRBD, make: MakeEngine = FakeEngine) -> Instance:
    """A TPM that waits for state, and hands its lock over too."""
    options = InstanceOptions(incoming=True, release_lock_outgoing=True, lock_retries=1)
    instance = Instance(make, opened(path, layout, incoming=True), options)
    instance.check()
    return instance


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process takes another byte."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
