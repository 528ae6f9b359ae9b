"""Sealing: a document's body encrypted by AES-256-GCM, its header authenticated, its data key in key slots.

Theory. Three keys stand above one another.

    user key    the operator's; opens a key slot (crbd.state.keys)
    data key    32 random bytes, one for the life of an instance; only ever in key slots. Encrypts nothing itself
    body key    HKDF-SHA256(data key, salt, "crbd body"); encrypts bodies. The salt, 32 random bytes, stands in
                clear text before the body

*Nonces.* AES-GCM is broken by one pair of (key, nonce) used twice. Counting nonces would break after a restore of an
older document, in a clone, or with two writers; so nothing is counted across processes. Every Seal, that is every
process that opens or makes a document, draws its own salt and so its own body key before it encrypts for the first
time, and a random 96-bit nonce for every document. After 2^32 documents it draws a new salt (NIST SP 800-38D, 8.3: at
most 2^32 random nonces under one key). A restored document is written on under a new salt, so nothing that was ever
encrypted before the restore shares its key. A clone gets a new data key (`Seal.create`) and with it new slots.

*Key slots* are bound to the UUID, and their list as a whole by an HMAC under a key derived from the data key: a slot
that was damaged or taken out is noticed by whoever opens another. The list is not bound to the body, so that slots can
be exchanged (`add`, `remove`, `crbd.state.document.rewrap`) without the body being encrypted anew. Whoever has an old
copy of the document and an old user key still has the data key: against a user key that has become known, only a new
data key helps.

Stored, little-endian: before the body

    u32 length of the whole area, u16 number of slots (1 to 8), the slots, 32 bytes HMAC-SHA256 of all before it
        under HKDF-SHA256(data key, UUID, "crbd key slots")

and as the body: 32 bytes salt, 12 bytes nonce, ciphertext, 16 bytes tag; the header's bytes are the additional data.

Keys lie in bytearrays that `wipe` overwrites; copies inside `cryptography`, and the short-lived `bytes` it returns, are
out of Python's reach.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable
from struct import Struct
from typing import Final
from uuid import UUID

from crbd.errors import StateSealedError, StateWrongKeyError, UsageError
from crbd.state.ciphers import KEY_SIZE, NONCE_SIZE, TAG_SIZE, AesGcm, hkdf, wipe
from crbd.state.fields import FieldReader, damaged
from crbd.state.keys import MAX_SLOTS, Entropy, KeySlot, UserKey, decode_slot, encode_slot, unwrap, wrap

SALT_SIZE: Final = 32
MAX_USES: Final = 1 << 32
"""Documents under one body key."""
OVERHEAD: Final = SALT_SIZE + NONCE_SIZE + TAG_SIZE
"""Bytes by which a sealed body is longer."""
MAX_AREA: Final = 16 * 1024
"""Bytes of all key slots together."""

_AREA = Struct("<IH")
_MAC_SIZE = 32


class Seal:
    """The open data key of one instance. Not thread-safe; `wipe` it when done."""

    __slots__ = ("_cipher", "_data_key", "_entropy", "_limit", "_salt", "_slots", "_uses", "_uuid")

    def __init__(
        self, uuid: UUID, data_key: bytearray, slots: tuple[KeySlot, ...], entropy: Entropy, limit: int = MAX_USES
    ) -> None:
        """Takes `data_key` over. Callers use `create` or `crbd.state.document.open_seal`."""
        self._uuid = uuid
        self._data_key = data_key
        self._slots = slots
        self._entropy = entropy
        self._limit = limit
        self._salt = b""
        self._uses = limit
        self._cipher: AesGcm | None = None

    @classmethod
    def create(
        cls, uuid: UUID, keys: Iterable[UserKey], *, entropy: Entropy = secrets.token_bytes, limit: int = MAX_USES
    ) -> Seal:
        """A new data key for a new instance, a clone, or one whose user key became known; 1 to 8 `keys` open it.

        Raises UsageError for no key, too many, or two of one label.
        """
        seal = cls(uuid, bytearray(entropy(KEY_SIZE)), (), entropy, limit)
        for key in keys:
            seal.add(key)
        if not seal.slots:
            raise UsageError("there is no key to seal the state with", "give a key or a passphrase")
        return seal

    @property
    def data_key(self) -> bytes:
        """A copy of the key itself, for a successor that goes on in the place of this process; for nobody else."""
        return bytes(self._data_key)

    @property
    def uuid(self) -> UUID:
        """Of the instance whose documents it seals."""
        return self._uuid

    @property
    def slots(self) -> tuple[KeySlot, ...]:
        """As the next document will have them."""
        return self._slots

    def add(self, key: UserKey) -> None:
        """Let `key` open the documents written from now on. Raises UsageError: no room, or its label is taken."""
        if len(self._slots) == MAX_SLOTS:
            raise UsageError(
                f"all {MAX_SLOTS} key slots are in use", "exchange one: crbd state rekey without --keep-old"
            )
        if any(slot.label == key.label for slot in self._slots):
            raise UsageError(f"there is a key slot {key.label!r} already", "choose another label, or remove it first")
        self._slots += (wrap(self._data_key, key, self._uuid, self._entropy),)

    def remove(self, label: str) -> None:
        """Take the slot `label` out of the documents written from now on. Raises UsageError: none, or the last."""
        kept = tuple(slot for slot in self._slots if slot.label != label)
        if len(kept) == len(self._slots):
            raise UsageError(f"there is no key slot {label!r}", f"there are {_listed(self._slots)}")
        if not kept:
            raise UsageError(f"{label!r} is the last key slot", "add another key first")
        self._slots = kept

    def exchange(self, labels: Iterable[str], keys: Iterable[UserKey]) -> None:
        """Take slots out and put one in for each key, in one step: it works where all slots are in use.

        Raises UsageError as `remove` and `add` do; the slots are as before then.
        """
        before = self._slots
        gone = set(labels)
        self._slots = tuple(slot for slot in before if slot.label not in gone)
        try:
            if len(before) - len(self._slots) != len(gone):
                raise UsageError(f"there are no key slots {_shown(gone)}", f"there are {_listed(before)}")
            for key in keys:
                self.add(key)
            if not self._slots:
                raise UsageError(f"{_shown(gone)} are all key slots", "add another key")
        except BaseException:
            self._slots = before
            raise

    def wipe(self) -> None:
        """Overwrite the data key; the object is of no use afterwards."""
        wipe(self._data_key)
        self._cipher = None
        self._limit = 0

    def encrypt(self, header: bytes, body: bytes) -> bytes:
        """The stored form of `body` under a nonce never used before; bound to `header`."""
        if self._uses >= self._limit:
            if not self._limit:
                raise ValueError("the seal has been wiped")
            self._salt = self._entropy(SALT_SIZE)
            self._cipher = self._body_cipher(self._salt)
            self._uses = 0
        assert self._cipher is not None
        self._uses += 1
        nonce = self._entropy(NONCE_SIZE)
        return self._salt + nonce + self._cipher.encrypt(nonce, body, header)

    def decrypt(self, header: bytes, stored: bytes, name: str) -> bytes:
        """The body. Raises StateDamagedError where header or body is not what was sealed."""
        reader = FieldReader(stored, name, "sealed body")
        salt = reader.take("salt", SALT_SIZE)
        nonce = reader.take("nonce", NONCE_SIZE)
        body = self._body_cipher(salt).decrypt(nonce, reader.rest(), header)
        if body is None:
            raise damaged(name, "sealed body", "is not authentic: header or body was changed after it was sealed")
        return body

    def encode_area(self) -> bytes:
        """The key slots' stored form."""
        slots = b"".join(encode_slot(slot) for slot in self._slots)
        area = _AREA.pack(_AREA.size + len(slots) + _MAC_SIZE, len(self._slots)) + slots
        return area + self._area_mac(area)

    def owns(self, area: bytes) -> bool:
        """Whether `area` was written by someone with this data key and UUID, and is as written."""
        return hmac.compare_digest(self._area_mac(area[:-_MAC_SIZE]), area[-_MAC_SIZE:])

    def _area_mac(self, area: bytes) -> bytes:
        key = hkdf(self._data_key, self._uuid.bytes, b"crbd key slots")
        mac = hmac.digest(key, area, hashlib.sha256)
        wipe(key)
        return mac

    def _body_cipher(self, salt: bytes) -> AesGcm:
        key = hkdf(self._data_key, salt, b"crbd body")
        cipher = AesGcm(key)
        wipe(key)
        return cipher


def area_length(data: memoryview, name: str) -> int:
    """Bytes of the key slot area that `data` begins with. Raises StateDamagedError."""
    reader = FieldReader(data, name, "key slots")
    length = reader.u32("length")
    if not _AREA.size + _MAC_SIZE <= length <= MAX_AREA:
        raise reader.wrong("length", f"is {length}, must be {_AREA.size + _MAC_SIZE} to {MAX_AREA}")
    return length


def decode_slots(area: bytes, name: str) -> tuple[KeySlot, ...]:
    """The slots of an area, unverified: for messages and to try keys on. Raises StateDamagedError."""
    reader = FieldReader(memoryview(area)[:-_MAC_SIZE], name, "key slots")
    reader.u32("length")
    count = reader.u16("count")
    if not 1 <= count <= MAX_SLOTS:
        raise reader.wrong("count", f"is {count}, must be 1 to {MAX_SLOTS}")
    slots = tuple(decode_slot(reader, name, number) for number in range(1, count + 1))
    reader.end()
    return slots


def open_area(
    area: bytes, uuid: UUID, keys: Iterable[UserKey], name: str, *, entropy: Entropy = secrets.token_bytes
) -> Seal:
    """The seal that the first fitting one of `keys` opens.

    Raises StateSealedError for no keys, StateWrongKeyError where none fits, StateDamagedError.
    """
    slots = decode_slots(area, name)
    keys = tuple(keys)
    if not keys:
        raise no_key(slots, name)
    for key in keys:
        for slot in slots:
            data_key = unwrap(slot, key, uuid, name)
            if data_key is not None:
                seal = Seal(uuid, data_key, slots, entropy)
                if seal.owns(area):
                    return seal
                raise damaged(name, "key slots", "are not authentic: one was changed or taken out")
    raise wrong_key(slots, name)


def reopen_area(area: bytes, uuid: UUID, data_key: bytes, name: str, *, entropy: Entropy = secrets.token_bytes) -> Seal:
    """The seal with the data key itself, as `Seal.data_key` gave it.

    Raises StateWrongKeyError where it is another's, StateDamagedError.
    """
    slots = decode_slots(area, name)
    seal = Seal(uuid, bytearray(data_key), slots, entropy)
    if not seal.owns(area):
        raise wrong_key(slots, name)
    return seal


def no_key(slots: tuple[KeySlot, ...], name: str) -> StateSealedError:
    """The error for a sealed document and no key at all."""
    return StateSealedError(f"{name} is encrypted and no key was given", f"give {_listed(slots)}")


def wrong_key(slots: tuple[KeySlot, ...], name: str) -> StateWrongKeyError:
    """The error for a sealed document that the given keys do not open."""
    return StateWrongKeyError(f"{name} is encrypted and none of the given keys opens it", f"give {_listed(slots)}")


def _shown(labels: Iterable[str]) -> str:
    return " and ".join(repr(label) for label in sorted(labels))


def _listed(slots: tuple[KeySlot, ...]) -> str:
    return " or ".join(slot.says for slot in slots)
