"""Which engine may be given which blob."""

from __future__ import annotations

import pytest

from crbd.engine.port import EngineVersion
from crbd.errors import StateNewerError
from crbd.state.compatibility import check_engine
from crbd.state.saved import EngineStamp, TpmState

V09, V010, V011, V012, V1 = (EngineVersion(*v) for v in ((0, 9, 2), (0, 10, 2), (0, 11, 0), (0, 12, 0), (1, 0, 0)))

GOOD = [
    (EngineStamp(0, 9, 2), V09),
    (EngineStamp(0, 9, 7), V09),
    (EngineStamp(0, 9, 2), V010),
    (EngineStamp(0, 9, 2), V1),
    (EngineStamp(0, 10, 0, "null", 1), V010),
    (EngineStamp(0, 10, 2, "default-v1", 7), V010),
    (EngineStamp(0, 10, 2, "custom:no-sha1", 7), V010),
    (EngineStamp(0, 10, 2, "custom", 2), V011),
    (EngineStamp(0, 11, 0, "default-v2", 8), V011),
    (EngineStamp(0, 12, 0, "default-v2", 9), V012),
]


@pytest.mark.parametrize(("engine", "running"), GOOD)
def test_what_may_be_given(engine: EngineStamp, running: EngineVersion) -> None:
    check_engine(TpmState(b"x", engine), running)


BAD = [
    (EngineStamp(0, 10, 2, "default-v1", 7), V09, "written by libtpms 0.10.2, and this is libtpms 0.9.2", "0.10 or"),
    (EngineStamp(0, 10, 0, "null", 1), V09, "written by libtpms 0.10.0", "libtpms 0.10 or newer"),
    (EngineStamp(1, 0, 0), V011, "written by libtpms 1.0.0", "libtpms 1.0 or newer"),
    (EngineStamp(0, 9, 2, "default-v1", 1), V09, "profile 'default-v1'", "0.10 or newer"),
    (EngineStamp(0, 10, 2, "default-v2", 7), V010, "profile 'default-v2'", "0.11 or newer"),
    (EngineStamp(0, 10, 2, "fips-2030", 7), V1, "profile 'fips-2030'", "the libtpms that wrote it"),
    (EngineStamp(0, 9, 2, "", 2), V09, "StateFormatLevel 2, and libtpms 0.9.2 reads up to 1", "0.10 or newer"),
    (EngineStamp(0, 10, 2, "default-v1", 8), V010, "StateFormatLevel 8", "0.11 or newer"),
    (EngineStamp(0, 11, 0, "default-v2", 9), V011, "StateFormatLevel 9", "the libtpms that wrote it"),
]


@pytest.mark.parametrize(("engine", "running", "what", "remedy"), BAD)
def test_what_is_refused(engine: EngineStamp, running: EngineVersion, what: str, remedy: str) -> None:
    with pytest.raises(StateNewerError) as caught:
        check_engine(TpmState(b"x", engine), running, "/the/file")
    assert caught.value.what.startswith("/the/file")
    assert what in caught.value.what
    assert remedy in caught.value.remedy
