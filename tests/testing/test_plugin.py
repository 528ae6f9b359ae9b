"""The pytest plugin, as somebody else's project uses it."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

import crbd.testing.plugin
from tests.cli.process import PATIENCE, wait_until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def project(directory: Path, tests: str) -> Iterator[Path]:
    """A project with these tests, and TMPDIR for its TPMs, which is empty afterwards."""
    (directory / "test_it.py").write_text(tests)
    places = directory / "t"
    places.mkdir()
    yield directory
    assert list(places.iterdir()) == [], "no TPM stays behind"


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """pytest in that project, with this plugin and no other."""
    environment = os.environ | {
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(directory / "t"),
        "TSS2_LOG": "all+none",
    }
    command = [sys.executable, "-m", "pytest", "-p", "crbd.testing.plugin", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command, check=False, cwd=directory, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE
    )


def test_pytest_finds_it() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    assert points == {"crbd": crbd.testing.plugin.__name__}


def test_it_costs_nothing_where_no_test_wants_a_tpm(tmp_path: Path) -> None:
    probe = (
        "import sys\ndef test_it():\n"
        "    loaded = [name for name in sys.modules if name.split('.')[0] in ('crbd', 'trio', 'tpm2_pytss')]\n"
        "    assert sorted(loaded) == ['crbd', 'crbd.testing', 'crbd.testing.plugin']\n"
    )
    with project(tmp_path, probe):
        done = run(tmp_path)
    assert done.returncode == 0, done.stdout


EACH_ITS_OWN = """
import pytest
from tpm2_pytss import ESYS_TR, TPM2_ALG, TPML_DIGEST_VALUES, TPMT_HA, TPMU_HA

@pytest.mark.parametrize("number", range(3))
def test_fresh(crbd_tpm, crbd_esapi, number):
    assert bytes(crbd_esapi.pcr_read("sha256:16")[2][0]) == bytes(32)
    crbd_esapi.pcr_extend(ESYS_TR.PCR16, digests())

@pytest.mark.parametrize("number", range(2))
def test_shared(crbd_tpm_session, number):
    with crbd_tpm_session.esapi() as esapi:
        read = bytes(esapi.pcr_read("sha256:16")[2][0])
        assert (read == bytes(32)) == (number == 0)
        esapi.pcr_extend(ESYS_TR.PCR16, digests())

def test_several(crbd_tpm_factory, crbd_tpm, crbd_tpm_session):
    with crbd_tpm_factory.make() as another:
        assert len({another.tcti, crbd_tpm.tcti, crbd_tpm_session.tcti}) == 3

def digests():
    return TPML_DIGEST_VALUES([TPMT_HA(hashAlg=TPM2_ALG.SHA256, digest=TPMU_HA(sha256=bytes([1]) * 32))])
"""


def test_each_test_has_its_own_and_workers_do_not_meet(tmp_path: Path) -> None:
    places = [tmp_path / "one", tmp_path / "two"]
    for place in places:
        place.mkdir()
    with project(places[0], EACH_ITS_OWN), project(places[1], EACH_ITS_OWN), ThreadPoolExecutor() as workers:
        for done in workers.map(run, places):
            assert done.returncode == 0, done.stdout + done.stderr
            assert "6 passed" in done.stdout


FAILING = """
def test_it(crbd_tpm, crbd_esapi):
    with crbd_tpm.faults("GetRandom:1=lockout"):
        crbd_esapi.get_random(8)
"""


def test_a_failed_test_says_what_the_tpm_said(tmp_path: Path) -> None:
    with project(tmp_path, FAILING):
        done = run(tmp_path)
    assert done.returncode == 1
    assert "Captured TPM call" in done.stdout
    assert "injected fault: GetRandom:1=lockout (TPM2_GetRandom)" in done.stdout


def test_no_library_is_one_clear_error(tmp_path: Path) -> None:
    with project(tmp_path, "def test_it(crbd_tpm): pass"):
        done = run(tmp_path, "--crbd-libtpms", "/nonexistent")
    assert done.returncode == 1
    assert "EngineMissingError: libtpms cannot be loaded (/nonexistent" in done.stdout


def test_nothing_stays_of_a_run_that_breaks_off(tmp_path: Path) -> None:
    tests = "import os\ndef test_it(crbd_tpm, crbd_tpm_session): os._exit(7)\n"
    with project(tmp_path, tests) as directory:
        assert run(directory).returncode == 7
        wait_until(lambda: not list((directory / "t").iterdir()), "the TPMs' end")
