"""swtpm_setup's question about a linear file, apart: it is asked seldom, and what answers it takes long to import."""

from __future__ import annotations

from crbd.errors import StateAbsentError, StateError
from crbd.state.kinds import StateKind
from crbd.store.layout import open_backend


def linear_holds_state(uri: str) -> bool:
    """Whether there is a TPM in a linear file, readable or not."""
    try:
        store = open_backend(uri, create=False, lock=False)
    except StateAbsentError:
        return False
    except StateError:
        return True
    try:
        return store.load(StateKind.PERMANENT) is not None
    except StateError:
        return True
    finally:
        store.close()
