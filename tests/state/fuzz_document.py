"""Coverage-guided fuzzing of the document: any bytes become a Document or a StateError of one line with a remedy.

Atheris is no requirement of the tests (it has no wheels for every Python); the same judgement runs under hypothesis in
test_document_fuzz.py. To fuzz for ten minutes, from the top of the checkout:

    pip install atheris
    python -m tests.state.fuzz_document -max_total_time=600 -max_len=20000 CORPUS_DIRECTORY

Golden files make a good corpus: copy tests/state/golden/*.crbd into CORPUS_DIRECTORY.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from crbd.errors import StateError
from crbd.state.document import Document, decode, encode, key_slots, peek_header, verify
from crbd.state.sealing import Seal

from . import samples as s

SEALED = encode(s.sample(), Seal.create(s.UUID_A, [s.other_key()], entropy=s.counting_entropy(b"fuzz")))
ENTRANCES: tuple[Callable[[bytes], object], ...] = (
    decode,
    verify,
    key_slots,
    peek_header,
    lambda data: decode(data, [s.other_key()]),
)


def judged(data: bytes) -> None:
    """Raises AssertionError, or whatever leaked, where an entrance does neither."""
    for entrance in ENTRANCES:
        refusal: StateError | None = None
        try:
            found = entrance(data)
        except StateError as error:
            refusal = error
        if refusal is not None:
            assert refusal.remedy, refusal
            assert "\n" not in str(refusal), refusal
        elif entrance is ENTRANCES[-1]:
            assert found == s.sample(), "a forged document was taken for an authentic one"
        elif entrance is decode:
            assert isinstance(found, Document)
            assert decode(encode(found)) == found


def one_input(data: bytes) -> None:
    """As they come, and behind a right SHA-256, which a fuzzer would never find."""
    judged(data)
    judged(s.with_digest(data))
    judged(s.resummed(data))


if __name__ == "__main__":
    atheris = import_module("atheris")
    atheris.instrument_all()
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()
