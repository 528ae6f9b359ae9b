"""Every operator error, provoked. This makes docs/errors.md: `python -m tests.cli.operator_errors > docs/errors.md`.

A case is a command as an operator types it, with everything of its own below /srv, and what makes it fail. Two cases of
one kind of error differ in what is to be done.
"""

from __future__ import annotations

import ctypes
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

from crbd import __file__ as crbd_package
from crbd import errors
from crbd.cli.main import build_parser
from crbd.errors import OperatorError
from crbd.state.document import Document, decode, encode
from crbd.state.header import MAGIC
from crbd.state.saved import EngineStamp, TpmState
from crbd.state.slots import SECTOR, SLOT_OFFSETS
from crbd.store.document import FILE_NAME
from crbd.store.lockfile import LockFile
from tests.cli.process import serving
from tests.cli.states import Done, crbd, golden, key_file, put, put_swtpm
from tests.state import samples as s
from tests.store.test_slot_file import file_size_limit

SERVE = "crbd serve --state /srv/tpm --ctrl unix:/srv/ctrl"
Arrange = Callable[[Path], AbstractContextManager[object] | None]


@dataclass(frozen=True, slots=True)
class Case:
    """`command`, after `arrange` has seen to it that it fails with `kind`; `arrange` may return what must hold while it
    runs. `apart` is Python to run first, in a process of its own.
    """

    kind: type[OperatorError]
    command: str
    arrange: Arrange
    apart: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the page."""

    code: int
    name: str
    command: str
    what: str
    remedy: str


# -- what makes commands fail


def nothing(place: Path) -> None:
    """Neither state nor anything else is there."""


def the_package_alone(place: Path) -> None:
    """Copied, not installed."""
    shutil.copytree(Path(crbd_package).parent, place / "site" / "crbd", ignore=shutil.ignore_patterns("__pycache__"))


def whole(place: Path) -> None:
    put(place / "tpm", golden(3))


def sealed(place: Path) -> None:
    put(place / "tpm", golden(3, "sealed"))


def sealed_by_another_key(place: Path) -> None:
    sealed(place)
    key_file(place, s.OTHER_KEY)


def writable_by_all(place: Path) -> None:
    whole(place)
    (place / "tpm").chmod(0o777)


def plain_and_a_key(place: Path) -> None:
    whole(place)
    key_file(place)


def only(content: bytes) -> Arrange:
    """The state's file holds that alone."""

    def arrange(place: Path) -> None:
        (place / "tpm").mkdir()
        (place / "tpm" / FILE_NAME).write_bytes(content)

    return arrange


def damaged(place: Path) -> None:
    whole(place)
    with (place / "tpm" / FILE_NAME).open("r+b") as file:
        for offset in SLOT_OFFSETS:
            file.seek(offset + SECTOR + 100)
            file.write(b"XXXX")


def rejected(place: Path) -> None:
    def broken(document: Document) -> Document:
        return replace(document, permanent=TpmState(b"no TPM at all", EngineStamp(0, 9, 2)))

    put(place / "tpm", encode(broken(decode(golden(3)))))


def exported_and_cut(place: Path) -> None:
    (place / "export").write_bytes(golden(3)[:-100])


def two_generations(place: Path) -> None:
    put(place / "tpm", golden(1), golden(3))


def newer_format(place: Path) -> None:
    data = bytearray(golden(3))
    at = len(MAGIC)
    data[at : at + 4] = b"\x09\x00\x09\x00"
    (place / "export").write_bytes(data.replace(s.WRITER.encode(), b"crbd 7.0.0"))


def newer_engine(place: Path) -> None:
    document = decode(golden(3))
    put(place / "tpm", encode(replace(document, permanent=TpmState(b"from the future", EngineStamp(0, 99, 0)))))


def held_by_another(place: Path) -> AbstractContextManager[object]:
    whole(place)
    lock = LockFile.acquire(place / "tpm" / ".lock")
    (place / "tpm" / ".lock").write_bytes(b"4711\n")
    stack = ExitStack()
    stack.callback(lock.release)
    return stack


def a_file_in_the_way(place: Path) -> None:
    (place / "file").write_bytes(b"")


def interrupted(place: Path) -> None:
    (place / "tpm").mkdir()
    (place / "tpm" / f".{FILE_NAME}.new").write_bytes(b"")


def swtpms(place: Path) -> None:
    put_swtpm(place / "tpm")


def both_layouts(place: Path) -> None:
    put_swtpm(place / "tpm")
    (place / "tpm" / FILE_NAME).write_bytes(b"")


def in_use_for_something_else(place: Path) -> None:
    (place / "tpm").mkdir()
    (place / "tpm" / "README").write_bytes(b"")
    (place / "export").write_bytes(golden(3))


def of_another_instance(place: Path) -> None:
    whole(place)
    document = decode(golden(3))
    other = replace(document, identity=replace(document.identity, uuid=s.UUID_B))
    (place / "export").write_bytes(encode(other))


def full_disk(place: Path) -> AbstractContextManager[object]:
    whole(place)
    (place / "export").write_bytes(golden(3))
    return file_size_limit(SLOT_OFFSETS[1])


@contextmanager
def serving_with_a_library_that_goes_away(place: Path) -> Iterator[None]:
    ctypes.CDLL("libtpms.so.0")
    library = next(line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libtpms" in line)
    (place / "libtpms.so").symlink_to(library)
    arguments: list[str | Path] = ["--ephemeral", "--ctrl", f"unix:{place}/ctrl", "--libtpms", place / "libtpms.so"]
    with serving(place, *arguments):
        (place / "libtpms.so").unlink()
        yield


@contextmanager
def serving_without_init(place: Path) -> Iterator[None]:
    with serving(place, "--ephemeral", "--ctrl", f"unix:{place}/ctrl"):
        yield


def no_certificate_authority(place: Path) -> None:
    (place / "ca").mkdir()


def half_an_authority(place: Path) -> None:
    (place / "ca").mkdir()
    made = crbd("ca", "create", "--ca-dir", place / "ca")
    assert made.status == 0, made
    for key in (place / "ca").glob("*key*"):
        key.unlink()


CASES = (
    Case(
        errors.OperatorError,
        "crbd compat-path",
        the_package_alone,
        apart="import sys, importlib.metadata as m; sys.path.insert(0, '/srv/site'); m.files = lambda _: None",
    ),
    Case(errors.UsageError, "crbd serve --state /srv/tpm", nothing),
    Case(errors.UsageError, SERVE + " --flags startup-cleer", whole),
    Case(errors.UsageError, SERVE + " --key file:/srv/absent", whole),
    Case(errors.UsageError, "crbd state rollback /srv/tpm", two_generations),
    Case(errors.StateError, "crbd state import /srv/export /srv/tpm", in_use_for_something_else),
    Case(errors.StateAbsentError, SERVE, nothing),
    Case(errors.StateDamagedError, SERVE, damaged),
    Case(errors.StateDamagedError, SERVE, rejected),
    Case(errors.StateDamagedError, "crbd state import /srv/export /srv/tpm", exported_and_cut),
    Case(errors.StateNewerError, "crbd state import /srv/export /srv/tpm", newer_format),
    Case(errors.StateNewerError, SERVE, newer_engine),
    Case(errors.StateSealedError, SERVE, sealed),
    Case(errors.StateLockedError, SERVE, held_by_another),
    Case(errors.StateAccessError, "crbd serve --state /srv/file/tpm --create --ctrl unix:/srv/ctrl", a_file_in_the_way),
    Case(errors.StateEmptyError, SERVE, only(b"")),
    Case(errors.StateUnfinishedError, SERVE, interrupted),
    Case(errors.StateForeignError, SERVE, only(b"\x7fELF" + bytes(1000))),
    Case(errors.StateForeignError, SERVE, both_layouts),
    Case(errors.StateForeignError, SERVE + " --layout crbd", swtpms),
    Case(errors.EngineMissingError, SERVE + " --libtpms /srv/libtpms.so.0", whole),
    Case(errors.EngineFailedError, "crbd serve --ephemeral --flags startup-state --ctrl unix:/srv/ctrl", nothing),
    Case(errors.EndpointError, "crbd serve --ephemeral --ctrl unix:/srv/absent/ctrl", nothing),
    Case(errors.PidFileError, "crbd serve --ephemeral --ctrl unix:/srv/ctrl --pid /srv/absent/pid", nothing),
    Case(errors.DaemonError, "crbd registers --ctrl unix:/srv/ctrl", nothing),
    Case(
        errors.HandoverError,
        "CRBD_HANDOVER=nonsense crbd serve --ephemeral --ctrl unix:/srv/ctrl",
        nothing,
    ),
    Case(errors.NotUpgradedError, "crbd reload --ctrl unix:/srv/ctrl", serving_with_a_library_that_goes_away),
    Case(errors.SnapshotRefusedError, "crbd state snapshot --ctrl unix:/srv/ctrl /srv/out", serving_without_init),
    Case(
        errors.WallError,
        "crbd serve --ephemeral --landlock on --ctrl unix:/srv/ctrl",
        nothing,
        apart="import crbd.server.syscalls; crbd.server.syscalls.landlock_version = lambda: 0",
    ),
    Case(errors.StateWrongKeyError, SERVE + " --key file:/srv/key", sealed_by_another_key),
    Case(errors.StateIdentityError, "crbd state restore /srv/tpm /srv/export", of_another_instance),
    Case(errors.StateDowngradeError, "crbd state export /srv/tpm --out /srv/out --format-version 1", whole),
    Case(errors.StateUnsealedError, SERVE + " --key file:/srv/key", plain_and_a_key),
    Case(errors.StateWriteError, "crbd state restore /srv/tpm /srv/export --allow-rollback", full_disk),
    Case(errors.StateExposedError, SERVE, writable_by_all),
    Case(errors.AuthorityError, "crbd ca show --ca-dir /srv/ca", half_an_authority),
    Case(errors.AuthorityAbsentError, "crbd ca show --ca-dir /srv/ca", no_certificate_authority),
    Case(
        errors.ProvisionError,
        "crbd provision --state /srv/tpm --ca-dir /srv/ca --write-ek-cert-files /srv/absent",
        nothing,
    ),
    Case(
        errors.TssMissingError,
        "crbd provision --state /srv/tpm --certificates none",
        nothing,
        apart="import sys; sys.modules['tpm2_pytss'] = None",
    ),
)
"""In the order of the page, which is that of the exit codes."""


# -- what they print


def provoke(case: Case, place: Path) -> Done:
    """The command's end, as its operator sees it, with /srv for `place`."""
    with case.arrange(place) or nullcontext(), _environment(case):
        done = _apart(case, place, "sys.exit(main(sys.argv[1:]))") if case.apart else crbd(*_arguments(case, place))
    return Done(done.status, settled(done.out, place), settled(done.err, place))


def row_of(case: Case, place: Path) -> Row:
    """The page's row. Raises AssertionError where the command does not fail with the case's kind of error."""
    with case.arrange(place) or nullcontext(), _environment(case):
        if case.apart:
            done = _apart(
                case, place, "from tests.cli.operator_errors import caught; print(*caught(sys.argv[1:]), sep='\\n')"
            )
            name, what, remedy = done.out.rstrip("\n").split("\n")
        else:
            name, what, remedy = caught(_arguments(case, place))
    assert name == case.kind.__name__, (name, what)
    return Row(case.kind.exit_code, name, case.command, settled(what, place), settled(remedy, place))


def caught(arguments: list[str]) -> tuple[str, str, str]:
    """The name of the error that `crbd` ends with, what is wrong, and what to do."""
    try:
        parsed = build_parser(arguments[0]).parse_args(arguments)
        parsed.run(parsed)
    except OperatorError as error:
        return type(error).__name__, error.what, error.remedy
    raise AssertionError(f"crbd {shlex.join(arguments)} ended well")


def settled(text: str, place: Path) -> str:
    """Without what is another in every run, or on another host."""
    return re.sub(r"(^|crbd: |this is )libtpms \d+\.\d+\.\d+", r"\1libtpms 0.9.2", text.replace(str(place), "/srv"))


def _arguments(case: Case, place: Path) -> list[str]:
    words = shlex.split(case.command.replace("/srv", str(place)))
    return words[words.index("crbd") + 1 :]


def _environment(case: Case) -> AbstractContextManager[object]:
    """What stands before `crbd`, for as long as it runs."""
    words = shlex.split(case.command)
    return patch.dict(os.environ, dict(word.split("=", 1) for word in words[: words.index("crbd")]))


def _apart(case: Case, place: Path, end: str) -> Done:
    program = f"{case.apart.replace('/srv', str(place))}; import sys; from crbd.cli.main import main; {end}"
    done = subprocess.run(
        [sys.executable, "-c", program, *_arguments(case, place)],
        check=False,
        capture_output=True,
        text=True,
        timeout=20,
    )
    return Done(done.returncode, done.stdout, done.stderr)


# -- the page

_HEAD = """# Errors

What `crbd` says when it cannot do what it was asked to, by exit code (docs/exit-codes.md has them in short). The
command ends with that code and one line on standard error: `crbd:`, what is wrong, a colon, what to do about it. The
examples are what these commands print; of the causes that a kind of error has, some are shown.

| code | error | for example | says | what to do |
|---|---|---|---|---|
"""


def render(rows: list[Row]) -> str:
    """The page."""
    lines = [f"| {row.code} | {row.name} | `{row.command}` | {row.what} | {row.remedy} |\n" for row in rows]
    return _HEAD + "".join(line.replace("<", "\\<") for line in lines)


def parse(page: str) -> list[Row]:
    """The other way."""
    rows = []
    for line in page.splitlines():
        if line.startswith("| ") and not line.startswith("| code"):
            code, name, command, what, remedy = line.replace("\\<", "<").strip("| ").split(" | ")
            rows.append(Row(int(code), name, command.strip("`"), what, remedy))
    return rows


def main() -> None:
    """Provoke all of them and print the page."""
    rows = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as place:
            rows.append(row_of(case, Path(place)))
    sys.stdout.write(render(rows))


if __name__ == "__main__":
    main()
