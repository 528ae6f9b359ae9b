"""The ciphers, from `cryptography`: loaded when the first key is used, not before. Foreign errors end here."""

from __future__ import annotations

import hashlib
import hmac
from importlib import import_module
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY_SIZE: Final = 32
NONCE_SIZE: Final = 12
TAG_SIZE: Final = 16
"""Bytes, of AES-256-GCM."""
AES_BLOCK: Final = 16


class AesGcm:
    """AES-256-GCM under one key of 32 bytes (NIST SP 800-38D; 96-bit nonces, 128-bit tags)."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytearray) -> None:
        cipher: AESGCM = import_module("cryptography.hazmat.primitives.ciphers.aead").AESGCM(key)
        self._cipher = cipher

    def encrypt(self, nonce: bytes, data: bytes | bytearray, authenticated: bytes) -> bytes:
        """Ciphertext and tag. `authenticated` is bound to them and stays outside."""
        return self._cipher.encrypt(nonce, data, authenticated)

    def decrypt(self, nonce: bytes, data: bytes, authenticated: bytes) -> bytes | None:
        """What was encrypted; None where key, nonce, data or `authenticated` is not what it was."""
        if len(data) < TAG_SIZE:
            return None
        try:
            return self._cipher.decrypt(nonce, data, authenticated)
        except import_module("cryptography.exceptions").InvalidTag:
            return None


def hkdf(key: bytes | bytearray, salt: bytes, info: bytes) -> bytearray:
    """32 bytes of HKDF-SHA256 (RFC 5869)."""
    extracted = hmac.digest(salt, key, hashlib.sha256)
    return bytearray(hmac.digest(extracted, info + b"\x01", hashlib.sha256))


def aes_cbc_encrypt(key: bytes, vector: bytes, data: bytes) -> bytes:
    """AES-CBC without padding: `data` is whole blocks of 16 bytes, `vector` is one."""
    ciphers = import_module("cryptography.hazmat.primitives.ciphers")
    modes = import_module("cryptography.hazmat.primitives.ciphers.modes")
    algorithms = import_module("cryptography.hazmat.primitives.ciphers.algorithms")
    encryptor = ciphers.Cipher(algorithms.AES(key), modes.CBC(vector)).encryptor()
    return bytes(encryptor.update(data) + encryptor.finalize())


def aes_cbc_decrypt(key: bytes, vector: bytes, data: bytes) -> bytes:
    """The other way."""
    ciphers = import_module("cryptography.hazmat.primitives.ciphers")
    modes = import_module("cryptography.hazmat.primitives.ciphers.modes")
    algorithms = import_module("cryptography.hazmat.primitives.ciphers.algorithms")
    decryptor = ciphers.Cipher(algorithms.AES(key), modes.CBC(vector)).decryptor()
    return bytes(decryptor.update(data) + decryptor.finalize())


def wipe(key: bytearray) -> None:
    """Overwrite a key with zeros."""
    key[:] = bytes(len(key))
