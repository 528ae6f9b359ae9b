"""Documents to test with, and hypothesis strategies of every saved type."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from uuid import UUID

from hypothesis import strategies as st

from crbd.crb.config import CrbConfig
from crbd.crb.device import CrbDevice
from crbd.state import crb
from crbd.state.document import Document, Header
from crbd.state.header import DIGEST_SIZE, encode_header
from crbd.state.keys import Passphrase, RawKey, ScryptCost
from crbd.state.saved import EngineStamp, Identity, Session, TpmState
from crbd.state.sections import Section, encode_body

KEY = bytes(range(32))
OTHER_KEY = bytes(range(32, 64))
CHEAP = ScryptCost(log2_n=4, r=1, p=1)
UUID_A = UUID("a3b1c5d7-0000-4000-8000-0123456789ab")
UUID_B = UUID("b4c2d6e8-0000-4000-8000-ba9876543210")
WRITER = "crbd 0.1.0"


def counting_entropy(seed: bytes = b"") -> Callable[[int], bytes]:
    """Bytes that look random and are the same in every run; no two answers are alike."""
    count = 0

    def entropy(size: int) -> bytes:
        nonlocal count
        count += 1
        return hashlib.shake_256(seed + count.to_bytes(8, "little")).digest(size)

    return entropy


def key() -> RawKey:
    return RawKey(KEY)


def other_key() -> RawKey:
    return RawKey(OTHER_KEY, "other")


def passphrase(text: bytes = b"correct horse", label: str = "passphrase") -> Passphrase:
    return Passphrase(text, label, CHEAP)


def registers(config: CrbConfig | None = None) -> crb.CrbStateV3:
    return crb.saved(CrbDevice(config or CrbConfig.qemu_7_2()).freeze())


def sample(uuid: UUID = UUID_A, generation: int = 7) -> Document:
    """One of everything."""
    engine = EngineStamp(0, 9, 2)
    return Document(
        identity=Identity(uuid, "vm-1", generation, WRITER, 1_700_000_000, bytes(range(32))),
        writer_id=b"0123456789abcdef",
        written=1_700_000_100,
        permanent=TpmState(b"permanent" * 20, engine),
        volatile=TpmState(b"volatile" * 30, EngineStamp(0, 10, 2, "default-v1", 7)),
        savestate=TpmState(b"s", engine),
        crb=registers(),
        session=Session(locality=3, buffer_size=0xF80, established=True, last_command=0x17B),
    )


def with_digest(whole: bytes) -> bytes:
    """`whole` and its SHA-256: what is wrong in it is then not found by the SHA-256."""
    return whole + hashlib.sha256(whole).digest()


def resummed(data: bytes) -> bytes:
    """`data` with the right SHA-256 at its end."""
    return with_digest(data[:-DIGEST_SIZE])


def plain(header: Header, sections: tuple[Section, ...]) -> bytes:
    """A document of any header and sections."""
    body = encode_body(sections)
    return with_digest(encode_header(header, len(body)) + body)


def texts(limit: int, least: int = 0) -> st.SearchStrategy[str]:
    return st.text(min_size=least, max_size=limit).filter(
        lambda text: text.isprintable() and len(text.encode("utf-8", "replace")) <= limit
    )


u16 = st.integers(0, 0xFFFF)
u32 = st.integers(0, 0xFFFFFFFF)
u64 = st.integers(0, (1 << 64) - 1)
stamps = st.builds(EngineStamp, major=u16, minor=u16, micro=u16, profile=texts(255), format_level=u16)
tpm_states = st.builds(TpmState, data=st.binary(min_size=1, max_size=64), engine=stamps)
sessions = st.builds(Session, locality=st.integers(0, 4), buffer_size=u32, established=st.booleans(), last_command=u32)
identities = st.builds(
    Identity,
    uuid=st.uuids(),
    name=texts(255),
    generation=u64,
    writer=texts(64, 1),
    created=u64,
    ek_fingerprint=st.one_of(st.just(b""), st.binary(min_size=32, max_size=32)),
)
unknown_sections = st.lists(
    st.builds(
        Section,
        name=st.from_regex(r"x-[a-z0-9._-]{1,62}", fullmatch=True),
        version=st.integers(1, 0xFFFF),
        data=st.binary(max_size=64),
        may_skip=st.just(True),
    ),
    max_size=4,
    unique_by=lambda section: section.name,
).map(tuple)
register_states = st.one_of(
    st.sampled_from([registers(), registers(CrbConfig())]),
    st.builds(
        crb.CrbStateV3,
        completed=st.booleans(),
        statuses=st.lists(st.integers(0, 255), max_size=5).map(tuple),
        pending=st.integers(0, 255),
        registers=st.lists(u32, min_size=32, max_size=32).map(tuple),
        buffer=st.binary(max_size=64),
        transfer=st.none()
        | st.builds(
            crb.CrbTransfer,
            executor=st.integers(-1, 4),
            command=st.binary(max_size=32),
            response=st.binary(max_size=32),
            offset=u32,
        ),
    ),
)
documents = st.builds(
    Document,
    identity=identities,
    writer_id=st.binary(min_size=16, max_size=16),
    written=u64,
    permanent=st.none() | tpm_states,
    volatile=st.none() | tpm_states,
    savestate=st.none() | tpm_states,
    crb=st.none() | register_states,
    session=st.none() | sessions,
    checkpoint=st.booleans(),
    unknown=unknown_sections,
)
