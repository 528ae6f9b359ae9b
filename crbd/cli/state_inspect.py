"""`crbd state inspect` and `crbd state verify`."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crbd.cli.state_options import add_keys, add_library, engine_maker, keys_of
from crbd.errors import EngineMissingError, StateError, UsageError
from crbd.service.examination import examine
from crbd.service.judgement import MakeEngine, judge
from crbd.state.document import Document, check_complete
from crbd.state.keys import UserKey
from crbd.state.kinds import StateKind
from crbd.state.saved import TpmState
from crbd.store.directory import open_directory
from crbd.store.inspection import (
    DocumentReport,
    SlotReport,
    StateReport,
    SwtpmFile,
    report_document,
    report_state,
    report_swtpm,
    verify_state,
)
from crbd.store.layout import Layout
from crbd.store.offline import OfflineState, layout_of, read_document

Shown = dict[str, Any]
States = dict[StateKind, bytes | TpmState]


def add_inspect_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `inspect`."""
    parser.add_argument("path", metavar="DIR|FILE", type=Path, help="a state directory, or a document from export")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--no-engine",
        action="store_true",
        help="do not ask libtpms, of a copy, for endorsement keys and free NV memory",
    )
    add_keys(parser)
    add_library(parser)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `verify`."""
    parser.add_argument("path", metavar="DIR|FILE", type=Path, help="a state directory, or a document from export")
    parser.add_argument("--engine", action="store_true", help="let libtpms judge the TPM's state too")
    add_keys(parser)
    add_library(parser)


def inspect(arguments: argparse.Namespace) -> int:
    """Print what is there; returns 0. Raises a StateError."""
    path: Path = arguments.path
    with keys_of(arguments) as keys:
        shown, states = _looked_at(path, keys)
    # The lock is given back by now: nobody has to wait for the engine.
    shown["tpm"] = None if arguments.no_engine else _asked(states, engine_maker(arguments), str(path))
    print(json.dumps(shown, indent=2) if arguments.json else "\n".join(_lines(shown)))
    return 0


def _looked_at(path: Path, keys: tuple[UserKey, ...]) -> tuple[Shown, States]:
    """What is shown of it, and the TPM's states, none where they are encrypted. Raises a StateError."""
    if path.is_dir() and layout_of(path) is Layout.SWTPM:
        _refuse_keys(keys, path)
        return {"directory": str(path)} | _swtpm(report_swtpm(path)), _verified_swtpm(path)[0]
    if path.is_dir():
        with OfflineState(path) as state:
            report = report_state(state, keys)
        shown, document = {"directory": str(path)} | _state(report), report.current.document.document
    else:
        found = report_document(read_document(path), keys, str(path))
        shown, document = {"file": str(path)} | _document(found), found.document
    return shown, {} if document is None else _states_of(document)


def verify(arguments: argparse.Namespace) -> int:
    """Print one line if all is well and return 0. Raises a StateError for what is not."""
    path: Path = arguments.path
    with keys_of(arguments) as keys:
        states, words = _verified(path, keys)
    if arguments.engine and states:
        engine = judge(states, engine_maker(arguments), str(path))
        words += f"; libtpms {engine.version} accepts it"
    elif arguments.engine:
        raise UsageError(f"libtpms cannot judge {path}, which is encrypted", "give its key")
    print(f"{path}: {words}")
    return 0


def _verified(path: Path, keys: tuple[UserKey, ...]) -> tuple[States, str]:
    """The TPM's states (none where they are sealed and there is no key), and what was seen. Raises a StateError."""
    if path.is_dir() and layout_of(path) is Layout.SWTPM:
        _refuse_keys(keys, path)
        return _verified_swtpm(path)
    if path.is_dir():
        with OfflineState(path) as state:
            report = verify_state(state, keys)
        found = report.current.document
    else:
        found = report_document(read_document(path), keys, str(path))
        if found.document is not None:
            check_complete(found.document, str(path))
    whole = f"generation {found.header.generation} is whole"
    if found.document is None:
        return {}, f"{whole}; it is encrypted, and what is inside was not looked at, for want of the key"
    return _states_of(found.document), whole


def _verified_swtpm(path: Path) -> tuple[States, str]:
    files = report_swtpm(path)
    if any(file.encrypted for file in files):
        return {}, "swtpm's files are whole; they are encrypted, and what is inside was not looked at"
    store = open_directory(path, create=False)
    try:
        loaded = {kind: store.load(kind) for kind in StateKind}
    finally:
        store.close()
    return {kind: data for kind, data in loaded.items() if data is not None}, "swtpm's files are whole"


def _states_of(document: Document) -> States:
    states = {kind: document.state(kind) for kind in StateKind}
    return {kind: state for kind, state in states.items() if state is not None}


def _refuse_keys(keys: tuple[UserKey, ...], path: Path) -> None:
    if keys:
        raise UsageError(f"{path} is in the swtpm layout, and --key is for crbd's", "leave the key out")


# -- what is shown


def _asked(states: States, make_engine: MakeEngine, name: str) -> Shown | str:
    """What the TPM says of itself; in words, why it does not. That is no reason not to show the rest."""
    if StateKind.PERMANENT not in states:
        return "not asked: its state is encrypted, or there is none"
    try:
        found = examine(states, make_engine, name)
    except (EngineMissingError, StateError) as error:
        return f"not asked: {error}"
    return {
        "engine": found.engine.version,
        "endorsement_keys": [
            {"name": f"0x{key.handle:08x}", "fingerprint": key.fingerprint.hex()} for key in found.endorsement_keys
        ],
        "persistent_keys": found.persistent_keys,
        "persistent_free": found.persistent_free,
        "nv_indices": found.nv_indices,
        "nv_free_bytes": found.nv_free,
    }


def _state(report: StateReport) -> Shown:
    return {
        "layout": Layout.CRBD.value,
        "current": _slot(report.current),
        "fell_back": report.fell_back,
        "previous": None if report.previous is None else _slot(report.previous),
        "kept": [path.name for path in report.kept],
    }


def _slot(slot: SlotReport) -> Shown:
    return {"slot_generation": slot.slot_generation} | _document(slot.document)


def _document(report: DocumentReport) -> Shown:
    header = report.header
    shown: Shown = {
        "size": report.size,
        "format_version": header.format_version,
        "oldest_reader": header.oldest_reader,
        "suite": header.suite.name.lower(),
        "generation": header.generation,
        "uuid": str(header.uuid),
        "writer": header.writer,
        "writer_id": header.writer_id.hex(),
        "written": _time(header.written),
        "key_slots": [slot.says for slot in report.key_slots],
    }
    if report.document is None or report.sections is None:
        return shown | {"contents": "encrypted; give the key to see them"}
    identity = report.document.identity
    shown |= {
        "name": identity.name,
        "created": _time(identity.created),
        "ek_fingerprint": identity.ek_fingerprint.hex() or None,
        "engines": {kind.name.lower(): _engine(state) for kind, state in _stamped(report.document)},
        "sections": [
            {
                "name": section.name,
                "version": section.version,
                "size": len(section.data),
                "may_skip": section.may_skip,
            }
            for section in report.sections
        ],
    }
    return shown


def _stamped(document: Document) -> list[tuple[StateKind, TpmState]]:
    return [(kind, state) for kind in StateKind if (state := document.state(kind)) is not None]


def _engine(state: TpmState) -> Shown:
    engine = state.engine
    return {"version": engine.version, "profile": engine.profile or None, "format_level": engine.format_level or None}


def _swtpm(files: list[SwtpmFile]) -> Shown:
    return {
        "layout": Layout.SWTPM.value,
        "files": [
            {"name": file.path.name, "size": file.size, "blob_version": file.version, "encrypted": file.encrypted}
            for file in files
        ],
    }


def _time(seconds: int) -> str:
    """In ISO 8601, UTC; the bare number where the calendar does not reach."""
    try:
        return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return str(seconds)


def _lines(shown: Shown, indent: str = "") -> list[str]:
    """One line for each thing, what belongs together indented."""
    lines: list[str] = []
    for name, value in shown.items():
        label = f"{indent}{name.replace('_', ' ')}:"
        if isinstance(value, dict):
            lines += [label, *_lines(value, indent + "  ")]
        elif isinstance(value, list) and value:
            lines += [label, *(f"{indent}  {_phrase(item)}" for item in value)]
        else:
            lines.append(f"{label} {_word(value)}")
    return lines


def _phrase(item: Shown | str) -> str:
    if isinstance(item, str):
        return item
    return ", ".join(
        [str(item["name"]), *(f"{key.replace('_', ' ')} {_word(item[key])}" for key in item if key != "name")]
    )


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value in (None, "", []) else str(value)
