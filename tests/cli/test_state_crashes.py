"""`crbd state convert`, `clone` and `import` against power cuts: every prefix of what each asks the system for.

After each the TPM is there, whole: in the form it had, in the new one, or, in the middle of a conversion in place, in
both, which everybody refuses while the kept files hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path

import pytest

from crbd.errors import StateDamagedError, StateForeignError, StateUnfinishedError
from crbd.state.document import decode, peek_header
from crbd.state.keys import RawKey, UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import EngineStamp
from crbd.state.swtpm import decode_file
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.document import FILE_NAME, NewTpm
from crbd.store.layout import Layout, found_in, open_state
from crbd.store.offline import kept_files
from crbd.store.slots import SlotFile
from tests.state import samples as s
from tests.store.crashing import Model, Recorder, Tree, build

from .states import blobs, golden, key_file, put, put_swtpm, state

IDLE, BUSY = golden(1), golden(3)
TPM: Mapping[StateKind, bytes] = blobs(decode(IDLE))
BUSY_TPM: Mapping[StateKind, bytes] = blobs(decode(BUSY))
SWTPM_KEY = SwtpmKey(bytes(range(100, 132)))


class End(Enum):
    """What a crash left."""

    NOTHING = "no state"
    UNFINISHED = "what no TPM was made of yet, and says so"
    CRBD = "crbd's layout, plain"
    SEALED = "crbd's layout, sealed"
    SWTPM = "swtpm's layout"
    LINEAR = "a linear file"
    BOTH = "both layouts, which is refused"


def trees_of(root: Path, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[Tree]:
    """Every tree a power cut in the middle of `run` may leave of `root`."""
    found: dict[tuple[tuple[Path, bytes | None], ...], Tree] = {}

    def crash(model: Model) -> None:
        for tree in model.crashes():
            found.setdefault(tuple(sorted(tree.items())), tree)

    with monkeypatch.context() as patch:
        recorder = Recorder(patch, root, crash)
        crash(recorder.model)
        run()
        crash(recorder.model)
    return list(found.values())


def end_of(path: Path, keys: list[UserKey], wanted: Mapping[StateKind, bytes], swtpm_key: SwtpmKey | None) -> End:
    """What lies at `path`; where it opens it must be the whole TPM."""
    try:
        layout = found_in(path)
    except StateForeignError:
        assert kept(path, keys, swtpm_key) == wanted
        return End.BOTH
    if layout is None:
        return End.NOTHING
    sealed = layout is Layout.CRBD and (path / FILE_NAME).exists() and is_sealed(path)
    new = NewTpm("", tuple(keys) if sealed else ())
    try:
        store = open_state(path, create=False, new=new, swtpm_key=None if layout is Layout.CRBD else swtpm_key)
    except StateUnfinishedError:
        return End.UNFINISHED
    except StateDamagedError as error:
        # What goes before permanent state: nothing of it was ever a TPM.
        if "tpm2-00.permall is missing" not in error.what:
            raise
        return End.UNFINISHED
    store.use_engine(EngineStamp(0, 9, 2))
    found = {kind: store.load(kind) for kind in StateKind}
    store.close()
    assert {kind: data for kind, data in found.items() if data is not None} == wanted
    if layout is Layout.CRBD:
        return End.SEALED if sealed else End.CRBD
    return End.SWTPM if layout is Layout.SWTPM else End.LINEAR


def is_sealed(path: Path) -> bool:
    slots = SlotFile.open(path / FILE_NAME, create=False, writable=False)
    loaded = slots.load()
    slots.close()
    assert loaded is not None
    return peek_header(loaded.payload, "").sealed


def kept(path: Path, keys: list[UserKey], swtpm_key: SwtpmKey | None) -> Mapping[StateKind, bytes]:
    """The TPM in the files that a conversion in place keeps."""
    names = {file.name for file in kept_files(path)}
    if f"{FILE_NAME}.before-convert" in names:
        slots = SlotFile.open(path / f"{FILE_NAME}.before-convert", create=False, writable=False)
        loaded = slots.load()
        slots.close()
        assert loaded is not None
        header = peek_header(loaded.payload, "")
        return blobs(decode(loaded.payload, keys if header.sealed else None))
    files = {kind: path / f"swtpm.{kind.nvram_name}.before-convert" for kind in StateKind}
    return {kind: decode_file(file.read_bytes(), "", swtpm_key) for kind, file in files.items() if file.exists()}


def swtpm_key(place: Path) -> list[str]:
    (place / "swtpm-key").write_text(bytes(range(100, 132)).hex())
    return ["--swtpm-key", f"file={place}/swtpm-key,mode=aes-256-cbc"]


# -- in place

IN_PLACE: dict[str, tuple[list[str], set[End]]] = {
    "crbd to swtpm": (["--to", "swtpm"], {End.CRBD, End.BOTH, End.SWTPM}),
    "crbd to encrypted swtpm": (["--to", "swtpm", "swtpm-key"], {End.CRBD, End.BOTH, End.SWTPM}),
    "swtpm to crbd": (["--to", "crbd"], {End.SWTPM, End.BOTH, End.CRBD}),
    "encrypted swtpm to sealed crbd": (["--to", "crbd", "swtpm-key", "new-key"], {End.SWTPM, End.BOTH, End.SEALED}),
    "plain to sealed": (["--to", "crbd", "new-key"], {End.CRBD, End.SEALED}),
    "sealed to plain": (["--to", "crbd", "key", "--plain"], {End.SEALED, End.CRBD}),
}


@pytest.mark.parametrize("case", IN_PLACE)
def test_convert_in_place(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, ends = IN_PLACE[case]
    root, key = tmp_path / "root", key_file(tmp_path)
    root.mkdir()
    encrypted = SWTPM_KEY if "swtpm-key" in arguments else None
    if case.endswith("swtpm"):
        put(root / "tpm", IDLE)
    elif "swtpm" in case:
        put_swtpm(root / "tpm", encrypted)
    else:
        put(root / "tpm", golden(3, "sealed") if "key" in arguments else BUSY)
    wanted = TPM if "swtpm" in case else BUSY_TPM
    spelled = {"swtpm-key": swtpm_key(tmp_path), "new-key": ["--new-key", key], "key": ["--key", key]}
    options = [word for argument in arguments for word in spelled.get(argument, [argument])]
    trees = trees_of(root, lambda: state("convert", root / "tpm", *options, "--in-place"), monkeypatch)
    seen = set()
    for number, tree in enumerate(trees):
        place = tmp_path / str(number)
        build(tree, place)
        seen.add(end_of(place / "tpm", [RawKey(s.KEY)], wanted, encrypted))
    assert seen == ends
    assert end_of(root / "tpm", [RawKey(s.KEY)], wanted, encrypted) in ends - {End.BOTH}


# -- somewhere else

ELSEWHERE: dict[str, tuple[list[str], End]] = {
    "convert to swtpm": (["convert", "--to", "swtpm", "--out"], End.SWTPM),
    "convert to linear": (["convert", "--to", "linear", "--out"], End.LINEAR),
    "convert to crbd": (["convert", "--new-key", "KEY", "--to", "crbd", "--out"], End.SEALED),
    "clone copy": (["clone", "--policy", "copy"], End.CRBD),
    "clone replace": (["clone", "--new-key", "KEY", "--policy", "replace"], End.SEALED),
    "import": (["import"], End.CRBD),
}


@pytest.mark.parametrize("case", ELSEWHERE)
def test_into_another_place(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is untouched, and the new place holds nothing that is taken for a TPM, or the whole one."""
    (operation, *options), complete = ELSEWHERE[case]
    root, key = tmp_path / "root", key_file(tmp_path)
    root.mkdir()
    put(root / "tpm", IDLE)
    original = root / "tpm"
    if operation == "import":
        state("export", original, "--out", root / "exported")
        original = root / "exported"
    options = [key if option == "KEY" else option for option in options]
    source = {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}
    words = [original, root / "out"] if operation != "convert" else [root / "out", original]
    trees = trees_of(root, lambda: state(operation, *options, *words), monkeypatch)
    seen = set()
    for number, tree in enumerate(trees):
        place = tmp_path / str(number)
        build(tree, place)
        assert all((place / path.relative_to(root)).read_bytes() == data for path, data in source.items())
        seen.add(end_of(place / "out", [RawKey(s.KEY)], TPM, None))
    assert End.NOTHING in seen
    assert complete in seen
    assert seen <= {End.NOTHING, End.UNFINISHED, complete}
    assert end_of(root / "out", [RawKey(s.KEY)], TPM, None) is complete
