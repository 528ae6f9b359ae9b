"""Which layout the state at a path has, and the store for it.

    crbd     a directory with `tpm.crbd`, the document in two slots: what a new one gets
    swtpm    a directory with `tpm2-00.permall` and its sisters: opened in place, and kept as it is
    linear   a file or block device: swtpm's linear file, opened in place

What is there decides; a directory with state of crbd and of swtpm is refused, since nobody but its operator knows
which of the two is the TPM.
"""

from __future__ import annotations

import stat
from enum import Enum
from pathlib import Path
from uuid import UUID

from crbd.errors import (
    StateAbsentError,
    StateAccessError,
    StateDamagedError,
    StateForeignError,
    StateIdentityError,
    UsageError,
)
from crbd.state.swtpm_sealing import SwtpmKey
from crbd.store.directory import open_directory
from crbd.store.document import FILE_NAME, DocumentStore, NewTpm
from crbd.store.linear import open_linear
from crbd.store.options import DEFAULT, FileOptions
from crbd.store.port import Store

BEFORE_CONVERT = ".before-convert"
"""How the names of files end that an in-place conversion kept."""
CONVERTING = f"{FILE_NAME}.converting"
"""A new `tpm.crbd` before it takes the old one's place; one that is there otherwise is left of a power cut."""


class Layout(Enum):
    """The forms of state at rest."""

    CRBD = "crbd"
    SWTPM = "swtpm"
    LINEAR = "linear"


def found_in(path: Path) -> Layout | None:
    """The layout of what lies in a directory, or of a file;

    None where there is no state. What a file holds is not looked at. Raises StateForeignError, StateAccessError.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode):
            return Layout.LINEAR
        names = {entry.name for entry in path.iterdir()}
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "name a directory or a file that this user may read and write"
        raise StateAccessError(f"{path} cannot be read: {error.strerror}", remedy) from error
    crbd = not names.isdisjoint({FILE_NAME, f".{FILE_NAME}.new"})
    swtpm = any(name.startswith("tpm2-00.") for name in names)
    if crbd and swtpm:
        raise StateForeignError(
            f"{path} holds state of crbd ({FILE_NAME}) and of swtpm (tpm2-00.*)",
            "move the one that is not this TPM elsewhere",
        )
    if not crbd and not swtpm:
        return None
    return Layout.CRBD if crbd else Layout.SWTPM


def is_kept(name: str) -> bool:
    """Whether a file of that name was left by an upgrade or a conversion, for the case of need or for want of power."""
    front, _, number = name.rpartition("-")
    if name in (CONVERTING, f".{CONVERTING}.new"):
        return True
    return name.endswith(BEFORE_CONVERT) or (front == f"{FILE_NAME}.format" and number.isdecimal())


def _refuse_kept(path: Path) -> None:
    """Raises StateDamagedError for a place without state where a TPM was before."""
    kept = sorted(entry.name for entry in path.iterdir() if is_kept(entry.name)) if path.is_dir() else []
    if kept:
        raise StateDamagedError(
            f"{path} holds no TPM state, but {kept[0]}, which is left of a TPM that was there",
            "restore that TPM; to give it up, move what is left of it away",
        )


def open_state(
    path: Path,
    *,
    create: bool,
    layout: Layout | None = None,
    new: NewTpm | None = None,
    swtpm_key: SwtpmKey | None = None,
    uuid: UUID | None = None,
    options: FileOptions = DEFAULT,
    lock: bool = True,
) -> Store:
    """Open the state at `path`, locked unless `lock` is false; with `create` prepare a new one where there is none, in
    `layout` (crbd's if None).

    `new.keys` open crbd's layout and `swtpm_key` opens swtpm's; `options` concern swtpm's layouts. `uuid`: the instance
    that is expected, or made; swtpm's layouts do not say which they are. Raises a StateError, or UsageError for a key
    of the other kind; nothing is changed then but the lock file.
    """
    there = found_in(path)
    if there is not None and layout is not None and there is not layout:
        raise StateForeignError(
            f"{path} holds state in the {there.value} layout, not in the {layout.value} layout",
            f"leave the layout to what is there, or give --layout {there.value}",
        )
    if there is None and not create:
        raise StateAbsentError(
            f"there is no TPM state in {path}", "check the path, or make a new TPM there with --create"
        )
    if there is None:
        _refuse_kept(path)
    wanted = there or layout or Layout.CRBD
    if wanted is Layout.CRBD:
        if swtpm_key is not None:
            raise UsageError(f"a key of swtpm's was given, and {path} is in crbd's layout", "use --key")
        return DocumentStore(path, create=create, new=new, uuid=uuid, lock=lock)
    if new is not None and new.keys:
        raise UsageError(f"--key is for crbd's layout, and {path} is in swtpm's", "use --swtpm-key")
    if uuid is not None:
        raise StateIdentityError(
            f"{path} is in swtpm's layout, which does not say that it is instance {uuid}",
            "leave the UUID out, or convert it: crbd state convert --to crbd",
        )
    if wanted is Layout.SWTPM:
        return open_directory(path, create=create, key=swtpm_key, options=options, lock=lock)
    return open_linear(path, create=create, key=swtpm_key, options=options, lock=lock)


def open_backend(
    uri: str,
    *,
    create: bool,
    swtpm_key: SwtpmKey | None = None,
    options: FileOptions = DEFAULT,
    lock: bool = True,
) -> Store:
    """Open what swtpm's `--tpmstate backend-uri=` names, in swtpm's layouts: `dir://PATH` or `file://PATH`.

    Raises UsageError for another URI or an option that the layout does not have, else as `open_state`.
    """
    scheme, found, rest = uri.partition("://")
    path = Path(rest)
    if not found or not rest or scheme not in ("dir", "file"):
        raise UsageError(f"there is no backend {uri!r}", "use dir://PATH or file://PATH")
    if scheme == "dir":
        return open_state(path, create=create, layout=Layout.SWTPM, swtpm_key=swtpm_key, options=options, lock=lock)
    if options.backup:
        raise UsageError(f"{uri} keeps no backup", "leave backup out, or use dir://PATH")
    return open_state(path, create=create, layout=Layout.LINEAR, swtpm_key=swtpm_key, options=options, lock=lock)
