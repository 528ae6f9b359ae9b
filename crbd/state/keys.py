"""The user's keys, and key slots: copies of a document's data key, each wrapped by one of them.

Theory. A user key never encrypts state. It wraps the data key, in one slot of up to eight, so that the state opens by
any of several keys (the host's key file, a passphrase in the safe) and keys are exchanged without the state being
touched. Each slot draws a salt; the wrapping key is derived from the user key and that salt, so it is used for this
slot alone:

    key file     HKDF-SHA256(key, salt, "crbd key slot")
    passphrase   scrypt(passphrase, salt, N, r, p); the cost is stored, and bounded when read: 256 MiB of memory and
                 2^23 block mixes at most, so a hostile document cannot buy more of either

The wrapping is AES-256-GCM with a random nonce; slot head, salt, cost and the instance's UUID are authenticated. A slot
on disk, little-endian:

    u16 length of what follows, u8 kind, u8 length of the label, label (UTF-8)
    kind 1, key file:     16 bytes salt
    kind 2, passphrase:   u8 log2 N, u8 r, u8 p, 16 bytes salt
    12 bytes nonce, 32 bytes wrapped data key, 16 bytes tag

A slot of a kind that the reader does not know is kept and cannot be opened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct
from typing import Final
from uuid import UUID

from crbd.errors import UsageError
from crbd.state.ciphers import KEY_SIZE, NONCE_SIZE, TAG_SIZE, AesGcm, hkdf, wipe
from crbd.state.fields import FieldReader

MAX_SLOTS: Final = 8
MAX_LABEL: Final = 64
"""Bytes of UTF-8."""
MAX_SLOT: Final = 1024
"""Bytes; those of today's kinds have at most 163."""
SALT_SIZE: Final = 16
RAW: Final = 1
SCRYPT: Final = 2
MAX_SCRYPT_MEMORY: Final = 256 * 1024 * 1024
MAX_SCRYPT_WORK: Final = 1 << 23
"""N * r * p; the default costs about a tenth of that."""

Entropy = Callable[[int], bytes]
"""That many random bytes, fit for keys."""

_LENGTH = Struct("<H")
_INFO = b"crbd key slot"
_COST = Struct("<BBB")


@dataclass(frozen=True, slots=True)
class ScryptCost:
    """What trying a passphrase costs (RFC 7914). Raises ValueError beyond what a reader accepts.

    The default takes 32 MiB and about a quarter of a second.
    """

    log2_n: int = 15
    r: int = 8
    p: int = 3

    def __post_init__(self) -> None:
        if not (1 <= self.log2_n < 32 and 1 <= self.r < 256 and 1 <= self.p < 256):
            raise ValueError(f"scrypt with log2 N {self.log2_n}, r {self.r}, p {self.p}")
        if self.memory > MAX_SCRYPT_MEMORY or (self.r * self.p) << self.log2_n > MAX_SCRYPT_WORK:
            raise ValueError(f"scrypt would cost {self.memory >> 20} MiB, p {self.p}: more than a reader accepts")

    @property
    def memory(self) -> int:
        """Bytes."""
        return 128 * self.r << self.log2_n


class RawKey:
    """A key of 32 random bytes, from a file, a descriptor or a key service. Raises UsageError for another length."""

    __slots__ = ("_key", "label")
    kind: Final = RAW

    def __init__(self, key: bytes | bytearray, label: str = "key") -> None:
        if len(key) != KEY_SIZE:
            raise UsageError(f"the key has {len(key)} bytes", f"give one of exactly {KEY_SIZE} random bytes")
        self._key = bytearray(key)
        self.label = label

    def wipe(self) -> None:
        """Overwrite the key; the object is of no use afterwards."""
        wipe(self._key)

    def new_parameters(self, entropy: Entropy) -> bytes:
        """What a new slot stores so that `derive` finds its wrapping key again."""
        return entropy(SALT_SIZE)

    def derive(self, parameters: FieldReader) -> bytearray:
        """The wrapping key. Raises StateDamagedError for parameters that cannot be."""
        return hkdf(self._key, parameters.take("salt", SALT_SIZE), _INFO)


class Passphrase:
    """A passphrase, as bytes: nothing is stripped from it. Raises UsageError for an empty one."""

    __slots__ = ("_cost", "_text", "label")
    kind: Final = SCRYPT

    def __init__(self, text: bytes | bytearray, label: str = "passphrase", cost: ScryptCost | None = None) -> None:
        if not text:
            raise UsageError("the passphrase is empty", "give one of at least one character")
        self._text = bytearray(text)
        self._cost = cost or ScryptCost()
        self.label = label

    def wipe(self) -> None:
        """Overwrite the passphrase; the object is of no use afterwards."""
        wipe(self._text)

    def new_parameters(self, entropy: Entropy) -> bytes:
        """What a new slot stores so that `derive` finds its wrapping key again."""
        return _COST.pack(self._cost.log2_n, self._cost.r, self._cost.p) + entropy(SALT_SIZE)

    def derive(self, parameters: FieldReader) -> bytearray:
        """The wrapping key. Raises StateDamagedError for parameters that cannot be, or cost too much."""
        log2_n, r, p = (parameters.u8(field) for field in ("log2 N", "r", "p"))
        try:
            cost = ScryptCost(log2_n, r, p)
        except ValueError as error:
            raise parameters.wrong("cost", str(error)) from error
        salt = parameters.take("salt", SALT_SIZE)
        # OpenSSL counts the block mixes' own buffers too.
        most = cost.memory + 128 * cost.r * (cost.p + 2)
        return bytearray(hashlib.scrypt(self._text, salt=salt, n=1 << log2_n, r=r, p=p, maxmem=most, dklen=KEY_SIZE))


UserKey = RawKey | Passphrase


@dataclass(frozen=True, slots=True)
class KeySlot:
    """One wrapped copy of a data key, as stored. Raises ValueError for a label that has no stored form."""

    kind: int
    label: str
    data: bytes
    """Parameters of its kind, nonce, wrapped key and tag."""

    def __post_init__(self) -> None:
        if not self.label.isprintable() or not 1 <= len(self.label.encode("utf-8", "replace")) <= MAX_LABEL:
            raise ValueError(f"label of a key slot: {self.label!r}")

    @property
    def says(self) -> str:
        """What to call it in a message."""
        return f"{ {RAW: 'key file', SCRYPT: 'passphrase'}.get(self.kind, f'key of kind {self.kind}') } {self.label!r}"


def wrap(data_key: bytearray, key: UserKey, uuid: UUID, entropy: Entropy) -> KeySlot:
    """A new slot of the instance `uuid` that `key` opens."""
    parameters = key.new_parameters(entropy)
    wrapping = key.derive(FieldReader(parameters, "a new key slot", "parameters"))
    nonce = entropy(NONCE_SIZE)
    bound = _bound(key.kind, key.label, parameters, uuid)
    wrapped = AesGcm(wrapping).encrypt(nonce, data_key, bound)
    wipe(wrapping)
    return KeySlot(key.kind, key.label, parameters + nonce + wrapped)


def unwrap(slot: KeySlot, key: UserKey, uuid: UUID, name: str) -> bytearray | None:
    """The data key; None where `key` does not open `slot`. Raises StateDamagedError for a malformed slot."""
    if slot.kind != key.kind:
        return None
    reader = FieldReader(slot.data, name, f"key slot {slot.label}")
    wrapping = key.derive(reader)
    parameters = slot.data[: reader.position]
    nonce = reader.take("nonce", NONCE_SIZE)
    wrapped = reader.take("wrapped key", KEY_SIZE + TAG_SIZE)
    reader.end()
    data_key = AesGcm(wrapping).decrypt(nonce, wrapped, _bound(slot.kind, slot.label, parameters, uuid))
    wipe(wrapping)
    return None if data_key is None else bytearray(data_key)


def encode_slot(slot: KeySlot) -> bytes:
    """A slot's bytes."""
    label = slot.label.encode("utf-8")
    body = bytes((slot.kind, len(label))) + label + slot.data
    return _LENGTH.pack(len(body)) + body


def decode_slot(area: FieldReader, name: str, number: int) -> KeySlot:
    """The next slot of `area`. Raises StateDamagedError."""
    length = area.u16(f"length of key slot {number}")
    if length > MAX_SLOT:
        raise area.wrong(f"length of key slot {number}", f"is {length}, at most {MAX_SLOT} can be")
    reader = FieldReader(area.take(f"key slot {number}", length), name, f"key slot {number}")
    kind = reader.u8("kind")
    label_length = reader.u8("label length")
    if not 1 <= label_length <= MAX_LABEL:
        raise reader.wrong("label length", f"is {label_length}, must be 1 to {MAX_LABEL}")
    return KeySlot(kind, reader.text("label", label_length), reader.rest())


def _bound(kind: int, label: str, parameters: bytes, uuid: UUID) -> bytes:
    """What is authenticated beside the wrapped key."""
    text = label.encode("utf-8")
    return b"".join((_INFO, uuid.bytes, bytes((kind, len(text))), text, parameters))
