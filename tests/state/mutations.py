"""What may happen to bytes: cuts, flips, numbers at their limits, pieces moved, doubled or taken out."""

from __future__ import annotations

from hypothesis import strategies as st

LIMITS = [b"\0", b"\xff", b"\0\0", b"\xff\xff", b"\0\0\0\x80", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\1\0\0\0"]


def mutations(data: bytes) -> st.SearchStrategy[bytes]:
    """Variants of `data`, up to three changes each."""
    return st.lists(_change(len(data)), min_size=1, max_size=3).map(lambda changes: _all(data, changes))


def _change(size: int) -> st.SearchStrategy[tuple[int, int, bytes]]:
    """Replace the bytes from one place to another."""
    # Heads are short and bodies are long: half of all changes hit the first 200 bytes.
    place = st.one_of(st.integers(0, min(size, 200)), st.integers(0, size))
    put = st.one_of(st.sampled_from(LIMITS), st.binary(max_size=8))
    taken = st.one_of(st.none(), st.integers(0, 64), st.just(size))
    return st.builds(lambda at, new, count: (at, at + (len(new) if count is None else count), new), place, put, taken)


def _all(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    for start, end, new in changes:
        data = data[:start] + new + data[end:]
    return data
