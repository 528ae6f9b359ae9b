"""`crbd state upgrade` for any number of directories, and `crbd state prune` after it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from crbd.cli.state_options import add_directory, add_keys, keys_of
from crbd.errors import OperatorError, StateAccessError
from crbd.state.document import verify
from crbd.state.header import FORMAT_VERSION
from crbd.state.keys import UserKey
from crbd.store.files import sync_directory
from crbd.store.inspection import report_swtpm
from crbd.store.layout import Layout
from crbd.store.lockfile import LockFile
from crbd.store.offline import OfflineState, kept_files, layout_of, require_directory
from crbd.store.transfer import upgrade


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one directory. `status` is the exit status it would have by itself."""

    directory: str
    result: str
    """`upgraded`, `current` (nothing to do), `swtpm` (that layout has no formats of ours) or `failed`."""
    status: int = 0
    detail: str = ""


def add_upgrade_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `upgrade`."""
    parser.add_argument("directories", metavar="DIR", type=Path, nargs="+", help="state directories")
    parser.add_argument("--json", action="store_true", help="the results as JSON")
    add_keys(parser)


def run_upgrade(arguments: argparse.Namespace) -> int:
    """Upgrade each, whatever becomes of the others; returns 0 or the highest exit status among them."""
    results: list[Result] = []
    watched = sys.stderr.isatty()
    with keys_of(arguments) as keys:
        for number, directory in enumerate(arguments.directories, 1):
            if watched:
                sys.stderr.write(f"\r\x1b[K{number} of {len(arguments.directories)}: {directory}")
                sys.stderr.flush()
            results.append(_upgraded(directory, keys))
    if watched:
        sys.stderr.write("\r\x1b[K")
    counts = {kind: sum(result.result == kind for result in results) for kind in _KINDS}
    if arguments.json:
        print(json.dumps({"summary": counts, "directories": [asdict(result) for result in results]}, indent=2))
    else:
        for result in results:
            if result.status == 0:
                print(f"{result.directory}: {result.detail}")
        print(", ".join(f"{count} {text}" for kind, text in _KINDS.items() if (count := counts[kind])))
    for result in results:
        if result.status:
            print(f"crbd: {result.detail}", file=sys.stderr)
    return max(result.status for result in results)


_KINDS = {
    "upgraded": "upgraded",
    "current": "up to date",
    "swtpm": "in swtpm's layout",
    "failed": "failed",
}


def _upgraded(directory: Path, keys: tuple[UserKey, ...]) -> Result:
    shown = str(directory)
    try:
        layout = layout_of(directory)
        if layout is not Layout.CRBD:
            which = "layout" if layout is Layout.SWTPM else "linear file"
            return Result(shown, "swtpm", detail=f"in swtpm's {which}, nothing to upgrade")
        with OfflineState(directory, writable=True) as state:
            old = upgrade(state, keys)
    except OperatorError as error:
        return Result(shown, "failed", error.exit_code, str(error))
    if old is None:
        return Result(shown, "current", detail=f"is in format version {FORMAT_VERSION} already")
    return Result(
        shown,
        "upgraded",
        detail=f"from format version {old} to {FORMAT_VERSION}; the old document is kept in tpm.crbd.format-{old}",
    )


def add_prune_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `prune`."""
    add_directory(parser)


def run_prune(arguments: argparse.Namespace) -> int:
    """Remove what upgrades and conversions kept, say what; returns 0.

    Only where the state itself is whole: else what was kept may be all that is left. Raises a StateError.
    """
    directory: Path = arguments.directory
    require_directory(directory)
    if layout_of(directory) is Layout.CRBD:
        with OfflineState(directory) as state:
            verify(state.current().payload, state.name)
            return _prune(directory)
    report_swtpm(directory)
    lock = LockFile.acquire(directory / ".lock")
    try:
        return _prune(directory)
    finally:
        lock.release()


def _prune(directory: Path) -> int:
    kept = kept_files(directory)
    for path in kept:
        try:
            path.unlink()
            sync_directory(directory)
        except OSError as error:
            raise StateAccessError(f"{path} cannot be removed: {error.strerror}", "remove it by hand") from error
        print(f"{path}: removed")
    if not kept:
        print(f"{directory}: there is nothing to remove")
    return 0
