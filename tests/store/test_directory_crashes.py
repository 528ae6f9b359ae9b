"""swtpm's directory layout against power cuts: every prefix of what commits ask the system for, and every outcome."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from crbd.state.kinds import StateKind
from crbd.state.saved import Session
from crbd.state.side import SideState
from crbd.state.swtpm import encode_file
from crbd.store.directory import open_directory
from crbd.store.options import FileOptions
from crbd.store.port import Store
from tests.store.crashing import Contents, Model, Naming, Recorder, Tree, build

PERMANENT, VOLATILE = StateKind.PERMANENT, StateKind.VOLATILE
Changes = Mapping[StateKind, bytes | None]
State = tuple[bytes | None, bytes | None, SideState | None]
"""Permanent, volatile, and what belongs to the latter."""


def side(number: int) -> SideState:
    return SideState(None, Session(0, number, False, 0))


COMMITS: list[tuple[Changes, SideState | None]] = [
    ({PERMANENT: b"one"}, None),
    ({PERMANENT: b"two", VOLATILE: b"v"}, side(1)),
    ({}, side(2)),
    ({VOLATILE: b"w"}, side(3)),
    ({VOLATILE: None}, None),
    ({PERMANENT: b"three", VOLATILE: b"x"}, side(4)),
    ({VOLATILE: b"y"}, None),
    ({PERMANENT: b"another", VOLATILE: b"of another"}, side(5)),
    ({PERMANENT: b"four", VOLATILE: None}, None),
]


def state_of(store: Store) -> State:
    return store.load(PERMANENT), store.load(VOLATILE), store.load_side()


@pytest.mark.parametrize("backup", [False, True])
def test_every_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backup: bool) -> None:
    """After each, permanent state is as last acknowledged or as asked for since, and so is volatile state together
    with the registers that belong to it; nothing is unreadable. Where one commit changes both, they change together:
    no TPM is found with the volatile state of another.
    """
    root = tmp_path / "state"
    root.mkdir()
    options = FileOptions(backup=backup)
    states: list[State] = [(None, None, None)]
    survivors: list[tuple[Tree, int]] = []

    def crash(model: Model) -> None:
        survivors.extend((tree, len(states) - 1) for tree in model.crashes())

    with monkeypatch.context() as patches:
        Recorder(patches, root, crash)
        store = open_directory(root, create=False, options=options)
        for changes, beside in COMMITS:
            store.commit(changes, beside)
            states.append(state_of(store))
        store.close()

    seen: dict[tuple[tuple[Path, bytes | None], ...], State] = {}
    outcomes = set()
    for tree, acknowledged in survivors:
        key = tuple(sorted(tree.items()))
        if key not in seen:
            build(tree, tmp_path / str(len(seen)))
            again = open_directory(tmp_path / str(len(seen)), create=False, options=options)
            seen[key] = state_of(again)
            again.close()
        permanent, *volatile = seen[key]
        near = states[acknowledged : acknowledged + 2]
        assert permanent in [state[0] for state in near], tree
        assert volatile in [list(state[1:]) for state in near], tree
        under_way = COMMITS[acknowledged][0] if acknowledged < len(COMMITS) else {}
        if {PERMANENT, VOLATILE} <= under_way.keys():
            assert seen[key] in near, tree
        outcomes.add((acknowledged, permanent == near[-1][0], volatile == list(near[-1][1:])))
    for number in range(len(COMMITS)):
        assert {found for found in outcomes if found[0] == number} > {(number, True, True)} or number in (0, 6)


def test_the_model_knows_what_a_torn_file_is() -> None:
    """Renamed without having been synced: the old file, the new one, and what nobody wants."""
    old = encode_file(b"old")
    name = Path("state")
    model = Model({name: Contents(old, old)})
    model.pending.append(Naming(name, Contents(b"new!"), former=Path("new")))
    assert [tree[name] for tree in model.crashes()] == [old, b"", b"ne", bytes(4), b"ne\0\0", b"new!"]


def test_the_model_knows_two_names_of_one_file() -> None:
    one = Contents(b"new", b"old")
    trees = list(Model({Path("a"): one, Path("b"): one}).crashes())
    assert all(tree[Path("a")] == tree[Path("b")] for tree in trees)
    assert {tree[Path("a")] for tree in trees} >= {b"old", b"new"}


def test_the_model_knows_that_a_directory_may_be_missing() -> None:
    model = Model({}, [Naming(Path("made"))])
    model.names[Path("made/file")] = Contents(b"x", b"x")
    assert list(model.crashes()) == [{}, {Path("made"): None, Path("made/file"): b"x"}]
