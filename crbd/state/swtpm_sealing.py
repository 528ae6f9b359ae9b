"""The encrypted forms of swtpm's state blobs, and its four ways to come by a key. `crbd.state.swtpm` has the frame.

Facts (swtpm 0.1 to 0.11: swtpm_nvstore.c, swtpm_aes.c, key.c). Lengths are bytes; "key length" is 16 or 32.

- AES-128 or AES-256 in CBC mode. The text is padded to a multiple of the *key length* (not of the block), with 1 to
  key-length bytes that each hold their number.
- Version 2: three TLVs: ciphertext, HMAC-SHA256 under the AES key over ciphertext and IV, and the IV. The IV's TLV is
  as long as the key (or as the longest key that the process has used): CBC takes the first 16 bytes, the HMAC all of
  them. Blobs of 2018 have no IV TLV: the IV is zero then, and the HMAC over the ciphertext alone. A flag in the head
  says whether the key was one of 256 bits.
- Version 1: no TLVs. The blob's rest is the ciphertext under a zero IV of SHA-256(state) and state. No flag says how
  long the key was.
- In a file the state is encrypted by the file key. A migration blob is encrypted by the migration key, and what it
  holds may be encrypted by the file key besides.

Keys: 16 or 32 bytes as they are; hexadecimal digits; a passphrase (every byte of its file, line end included) through
PBKDF2-HMAC-SHA512 with salt "swtpm" and 1000 rounds, or through SHA-512 cut to the key length.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Callable
from typing import Final, Literal

from crbd.errors import StateDamagedError, StateWrongKeyError, UsageError
from crbd.state.ciphers import AES_BLOCK, aes_cbc_decrypt, aes_cbc_encrypt, wipe

KEY_SIZES: Final = (16, 32)
HMAC_SIZE: Final = 32
_SALT = b"swtpm"
_ROUNDS = 1000
_HEX = re.compile(rb"(?:0x)?([0-9a-fA-F]+)(?:\s.*)?", re.DOTALL)
_WRONG_KEY = "give the key that swtpm was started with"

Kdf = Literal["pbkdf2", "sha512"]
Entropy = Callable[[int], bytes]
"""That many random bytes."""


class SwtpmKey:
    """A key of `--key` or `--migration-key`. Raises UsageError for a length that is not 16 or 32 bytes."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes | bytearray) -> None:
        if len(key) not in KEY_SIZES:
            raise UsageError(f"the key has {len(key)} bytes", "give one of 16 bytes, or 32 with mode=aes-256-cbc")
        self._key = bytearray(key)

    @classmethod
    def from_binary(cls, data: bytes, size: int) -> SwtpmKey:
        """`format=binary`: the bytes are the key. `size` is the mode's key length; a longer key is refused.

        As in swtpm, 16 bytes are an AES-128 key even where the mode says 256. Raises UsageError.
        """
        if len(data) > size:
            raise UsageError(f"the key has {len(data)} bytes", f"give one of {size}, or choose mode=aes-256-cbc")
        return cls(data)

    @classmethod
    def from_hex(cls, text: bytes, size: int) -> SwtpmKey:
        """`format=hex`: `size` bytes in hexadecimal, perhaps behind 0x, up to the first white space.

        Raises UsageError.
        """
        match = _HEX.fullmatch(text)
        if match is None or len(match[1]) != 2 * size:
            raise UsageError("the key is not what its mode wants", f"give {2 * size} hexadecimal digits")
        return cls(bytes.fromhex(match[1].decode("ascii")))

    @classmethod
    def from_passphrase(cls, text: bytes, size: int, kdf: Kdf = "pbkdf2") -> SwtpmKey:
        """`pwdfile=`, `pwdfd=`: `text` is all of the file, its line end too."""
        if kdf == "sha512":
            return cls(hashlib.sha512(text).digest()[:size])
        return cls(hashlib.pbkdf2_hmac("sha512", text, _SALT, _ROUNDS, size))

    @property
    def secret(self) -> bytes:
        """A copy of the key itself, for a successor that goes on in the place of this process; for nobody else."""
        return bytes(self._key)

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self._key)

    def wipe(self) -> None:
        """Overwrite the key; the object is of no use afterwards."""
        wipe(self._key)

    def encrypt(self, text: bytes, vector: bytes) -> tuple[bytes, bytes]:
        """Ciphertext and HMAC, as version 2 stores them; `vector` is as long as the key."""
        ciphertext = aes_cbc_encrypt(bytes(self._key), vector[:AES_BLOCK], self._padded(text))
        return ciphertext, self._hmac(ciphertext + vector)

    def decrypt(self, ciphertext: bytes, mac: bytes, vector: bytes | None, name: str) -> bytes:
        """What version 2 stored. Raises StateWrongKeyError, or StateDamagedError where the form itself is wrong."""
        if vector is not None and len(vector) < AES_BLOCK:
            raise _malformed(name, f"its IV has {len(vector)} bytes")
        if len(mac) < HMAC_SIZE:
            raise _malformed(name, f"its HMAC has {len(mac)} bytes")
        if not hmac.compare_digest(self._hmac(ciphertext + (vector or b"")), mac[:HMAC_SIZE]):
            raise StateWrongKeyError(f"{name} is encrypted with another key, or was changed", _WRONG_KEY)
        text = self._unpadded(ciphertext, vector)
        if text is None:
            raise _malformed(name, "its padding is wrong though its HMAC is right")
        return text

    def decrypt_version_1(self, ciphertext: bytes, name: str) -> bytes:
        """What version 1 stored. Raises StateWrongKeyError: that form cannot tell a wrong key from damage."""
        text = self._unpadded(ciphertext, None)
        if text is None or hashlib.sha256(text[HMAC_SIZE:]).digest() != text[:HMAC_SIZE]:
            raise StateWrongKeyError(f"{name} is encrypted with another key, or was changed", _WRONG_KEY)
        return text[HMAC_SIZE:]

    def encrypt_version_1(self, text: bytes) -> bytes:
        """As version 1 stored it. Nothing writes it any more; kept beside its inverse, which tests need."""
        text = hashlib.sha256(text).digest() + text
        return aes_cbc_encrypt(bytes(self._key), bytes(AES_BLOCK), self._padded(text))

    def _hmac(self, data: bytes) -> bytes:
        return hmac.digest(self._key, data, hashlib.sha256)

    def _padded(self, text: bytes) -> bytes:
        count = self.size - len(text) % self.size
        return text + bytes((count,)) * count

    def _unpadded(self, ciphertext: bytes, vector: bytes | None) -> bytes | None:
        if not ciphertext or len(ciphertext) % AES_BLOCK or len(ciphertext) < self.size:
            return None
        start = bytes(AES_BLOCK) if vector is None else vector[:AES_BLOCK]
        text = aes_cbc_decrypt(bytes(self._key), start, ciphertext)
        count = text[-1]
        if not 1 <= count <= self.size or text[-count:] != bytes((count,)) * count:
            return None
        return text[:-count]


def _malformed(name: str, why: str) -> StateDamagedError:
    return StateDamagedError(f"{name} is malformed: {why}", "restore it from a backup")
