"""State directories to try `crbd state` on, made of the golden documents, and `crbd` in this process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from crbd.cli.main import main
from crbd.state.document import Document, decode
from crbd.state.keys import RawKey
from crbd.state.kinds import StateKind
from crbd.state.swtpm import encode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import FILE_NAME
from crbd.store.slots import SlotFile
from tests.state import samples as s

GOLDEN = Path(__file__).resolve().parents[1] / "state" / "golden"


@dataclass(frozen=True)
class Done:
    """A command's end."""

    status: int
    out: str
    err: str


def crbd(*arguments: str | Path) -> Done:
    """`crbd`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([str(argument) for argument in arguments])
    return Done(status, out.getvalue(), err.getvalue())


def state(*arguments: str | Path) -> str:
    """What `crbd state` prints, which must end well."""
    done = crbd("state", *arguments)
    assert (done.status, done.err) == (0, "")
    return done.out


def refuse(code: int, text: str, *arguments: str | Path, untouched: Path | None = None) -> None:
    """`crbd` must end with `code` and one line that holds `text`, and leave what is below `untouched` as it was."""
    before = None if untouched is None else contents(untouched)
    done = crbd(*arguments)
    assert done.status == code, done
    assert done.err.startswith("crbd: ")
    assert done.err.count("\n") == 1, done.err
    assert text in done.err
    assert done.out == ""
    if untouched is not None:
        assert contents(untouched) == before


def contents(place: Path) -> dict[str, bytes]:
    """Every file below `place` but lock files."""
    files = (path for path in place.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(place)): path.read_bytes() for path in files}


def golden(version: int, suite: str = "plain") -> bytes:
    return (GOLDEN / f"v{version}-{suite}.crbd").read_bytes()


def put(directory: Path, *documents: bytes) -> Path:
    """Commit the documents one after the other."""
    directory.mkdir(exist_ok=True)
    slots = SlotFile.open(directory / FILE_NAME, create=True)
    for document in documents:
        slots.commit(document)
    slots.close()
    return directory


def held(directory: Path) -> bytes:
    """The document that a directory holds."""
    slots = SlotFile.open(directory / FILE_NAME, create=False, writable=False)
    loaded = slots.load()
    slots.close()
    assert loaded is not None
    return loaded.payload


def undo(directory: Path) -> bytes | None:
    """The one before."""
    slots = SlotFile.open(directory / FILE_NAME, create=False, writable=False)
    loaded = slots.previous()
    slots.close()
    return None if loaded is None else loaded.payload


def document(directory: Path, key: bytes | None = None) -> Document:
    return decode(held(directory), None if key is None else [RawKey(key)])


def blobs(found: Document) -> dict[StateKind, bytes]:
    """The engine's states."""
    return {kind: blob.data for kind in StateKind if (blob := found.state(kind)) is not None}


def put_swtpm(directory: Path, key: SwtpmKey | None = None) -> Path:
    """swtpm's files with the golden TPM."""
    directory.mkdir()
    for kind, data in blobs(decode(golden(1))).items():
        (directory / f"tpm2-00.{kind.nvram_name}").write_bytes(encode_file(data, key))
    return directory


def key_file(place: Path, key: bytes = s.KEY, name: str = "key") -> str:
    """The value of a `--key`."""
    (place / name).write_bytes(key)
    return f"file:{place / name}"
