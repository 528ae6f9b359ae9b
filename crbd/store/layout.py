"""Which layout a state directory has, and the store for it.

    crbd     `tpm.crbd`, the document in two slots: what a new directory gets
    swtpm    `tpm2-00.permall` and its sisters: opened in place, and kept as it is

What is there decides; a directory with both is refused, since nobody but its operator knows which of the two is the
TPM.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from crbd.errors import StateAbsentError, StateAccessError, StateForeignError, StateUnsealedError
from crbd.store.directory import open_directory
from crbd.store.document import FILE_NAME, DocumentStore, NewTpm
from crbd.store.files import make_directory
from crbd.store.port import Store


class Layout(Enum):
    """The forms of a state directory."""

    CRBD = "crbd"
    SWTPM = "swtpm"


def found_in(directory: Path) -> Layout | None:
    """The layout of what lies in a directory;

    None where it holds no state. Raises StateForeignError, StateAccessError.
    """
    try:
        names = {entry.name for entry in directory.iterdir()}
    except FileNotFoundError:
        return None
    except OSError as error:
        remedy = "name a directory that this user may read and write"
        raise StateAccessError(f"{directory} cannot be read: {error.strerror}", remedy) from error
    crbd = not names.isdisjoint({FILE_NAME, f".{FILE_NAME}.new"})
    swtpm = any(name.startswith("tpm2-00.") for name in names)
    if crbd and swtpm:
        raise StateForeignError(
            f"{directory} holds state of crbd ({FILE_NAME}) and of swtpm (tpm2-00.*)",
            "move the one that is not this TPM elsewhere",
        )
    if not crbd and not swtpm:
        return None
    return Layout.CRBD if crbd else Layout.SWTPM


def open_state(directory: Path, *, create: bool, layout: Layout | None = None, new: NewTpm | None = None) -> Store:
    """Open and lock the state in `directory`; with `create` prepare a new one where there is none, in `layout`
    (crbd's if None).

    Raises a StateError; nothing is changed then but the lock file.
    """
    there = found_in(directory)
    if there is not None and layout is not None and there is not layout:
        raise StateForeignError(
            f"{directory} holds state in the {there.value} layout, not in the {layout.value} layout",
            f"leave the layout to what is there, or give --layout {there.value}",
        )
    if there is None and not create:
        raise StateAbsentError(
            f"there is no TPM state in {directory}", "check the path, or make a new TPM there with --create"
        )
    if (there or layout or Layout.CRBD) is Layout.SWTPM:
        if new is not None and new.keys:
            raise StateUnsealedError(
                f"{directory} is in the swtpm layout, which crbd does not encrypt yet", "leave the key out"
            )
        return open_directory(directory, create=create)
    if create:
        make_directory(directory)
    return DocumentStore(directory, create=create, new=new)
