"""The pytest plugin: TPMs for tests. docs/ci.md.

    crbd_tpm            a TPM that only this test has (crbd.testing.tpm.EphemeralTpm)
    crbd_esapi          a connection to it, as tpm2-pytss has them (an ESAPI)
    crbd_tpm_session    one for all tests that ask for it, of this process (each worker of pytest-xdist has its own)
    crbd_tpm_factory    for tests that need several, or one from a snapshot (crbd.testing.tpm.TpmFactory)

pytest loads this wherever crbd is installed, so it imports nothing before a test asks for a TPM.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tpm2_pytss import ESAPI

    from crbd.testing.tpm import EphemeralTpm, TpmFactory

_TPMS = pytest.StashKey[list["EphemeralTpm"]]()
"""The TPMs of a test, and those of all tests at the session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare --crbd-libtpms."""
    group = parser.getgroup("crbd", "TPMs for tests")
    group.addoption("--crbd-libtpms", metavar="FILE", help="the libtpms library to load (default: the system's)")


@pytest.fixture(scope="session")
def crbd_tpm_factory(request: pytest.FixtureRequest) -> Iterator[TpmFactory]:
    """Makes TPMs: `with crbd_tpm_factory.make() as tpm`."""
    module = import_module("crbd.testing.tpm")
    with module.TpmFactory(request.config.getoption("--crbd-libtpms")) as factory:
        yield factory


@pytest.fixture
def crbd_tpm(crbd_tpm_factory: TpmFactory, request: pytest.FixtureRequest) -> Iterator[EphemeralTpm]:
    """A new TPM for this test: started, empty, with seeds of its own."""
    with crbd_tpm_factory.make() as tpm:
        request.node.stash.setdefault(_TPMS, []).append(tpm)
        yield tpm


@pytest.fixture(scope="session")
def crbd_tpm_session(crbd_tpm_factory: TpmFactory, request: pytest.FixtureRequest) -> Iterator[EphemeralTpm]:
    """One TPM for all tests of this process that ask for it; what one does to it the next one sees."""
    with crbd_tpm_factory.make() as tpm:
        request.node.stash.setdefault(_TPMS, []).append(tpm)
        yield tpm


@pytest.fixture
def crbd_esapi(crbd_tpm: EphemeralTpm) -> Iterator[ESAPI]:
    """An ESAPI connected to this test's `crbd_tpm`. While it is open no other program can use that TPM."""
    with crbd_tpm.esapi() as context:
        yield context


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails has what its TPMs said in its report."""
    if call.excinfo is not None:
        for tpm in (*item.stash.get(_TPMS, []), *item.session.stash.get(_TPMS, [])):
            if said := tpm.log:
                item.add_report_section(call.when, "TPM", said)
    return (yield)
