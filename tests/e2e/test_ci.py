"""docs/ci.md and configs/ci: every command and every test in them is run; and other software finds its TPM."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "ci.md").read_text()
BLOCKS = [re.sub("(?m)^    ", "", block).strip() for block in re.findall(r"(?m)(?:^    .*\n|^\n)+", PAGE)]
COMMANDS = [line for block in BLOCKS if block.startswith("crbd ") for line in block.splitlines()]
TESTS = [block for block in BLOCKS if block.startswith(("def ", "@"))]
JOBS = {
    name: re.findall(pattern, (ROOT / "configs" / "ci" / name).read_text())
    for name, pattern in {
        "github-actions.yml": r"(?m)^      - run: (.*)$",
        "gitlab-ci.yml": r"(?m)^    - (.*)$",
    }.items()
}
PROVIDER = "-provider tpm2 -provider default"
IMPORTS = "import os, subprocess\nimport pytest\nfrom tpm2_pytss import TSS2_Exception\n\n"


def shell(script: str, directory: Path) -> str:
    """What a script says that must succeed, with this checkout's crbd in PATH. No TPM stays behind."""
    programs, places = directory / "bin", directory / "t"
    for made in (programs, places):
        made.mkdir(exist_ok=True)
    crbd = programs / "crbd"
    crbd.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m crbd "$@"\n')
    crbd.chmod(0o755)
    environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "TMPDIR": str(places)}
    done = subprocess.run(
        ["sh", "-ec", script], check=False, cwd=directory, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in places.iterdir() if path.name.startswith("crbd-")] == []
    return done.stdout


def run_tests(text: str, directory: Path, *arguments: str) -> str:
    """What pytest says of tests that must pass, in a project of their own."""
    (directory / "test_it.py").write_text(text)
    plugins = ["crbd.testing.plugin", *(["xdist.plugin"] if "--numprocesses" in arguments else [])]
    options = " ".join(["-p no:cacheprovider", *(f"-p {plugin}" for plugin in plugins), *arguments])
    return shell(
        f"PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 PYTHONPATH={ROOT} TSS2_LOG=all+none {sys.executable} -m pytest {options}",
        directory,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page(command: str, tmp_path: Path) -> None:
    assert shell(command, tmp_path)


def test_the_tests_of_the_page(tmp_path: Path) -> None:
    said = run_tests(IMPORTS + "\n\n".join(TESTS), tmp_path)
    wanted = sum(block.count("def test_") for block in TESTS)
    assert wanted == 4
    assert f"{wanted} passed" in said


@pytest.mark.parametrize("name", JOBS)
def test_the_jobs(name: str, tmp_path: Path) -> None:
    commands = [command for command in JOBS[name] if command.startswith("crbd ")]
    assert len(commands) == 2
    for command in commands:
        assert shell(command, tmp_path)
    (tests,) = [command for command in JOBS[name] if command.startswith("pytest ")]
    arguments = tests.split()[1:]
    if find_spec("xdist") is None:
        arguments = arguments[2:]
    assert "3 passed" in run_tests("def test_a(crbd_tpm): pass\ntest_b = test_c = test_a\n", tmp_path, *arguments)


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("tss2_provision && tss2_getrandom -n 4 --hex -o - && tss2_list", "/HS/SRK"),
        (
            "tpm2_createprimary -Q -c p.ctx && tpm2_flushcontext -t && tpm2_getcap properties-fixed",
            "TPM2_PT_MANUFACTURER",
        ),
        (f"openssl genpkey {PROVIDER} -algorithm EC -pkeyopt group:P-256 -out k && cat k", "TSS2 PRIVATE KEY"),
        (
            "echo secret | systemd-creds encrypt --with-key=tpm2 --name=x - c && systemd-creds decrypt --name=x c",
            "secret",
        ),
    ],
    ids=["the Feature API", "tpm2-tools", "OpenSSL", "systemd"],
)
def test_software_that_finds_its_tpm(script: str, said: str, tmp_path: Path) -> None:
    assert said in shell(f"crbd run -- sh -ec '{script}'", tmp_path)
