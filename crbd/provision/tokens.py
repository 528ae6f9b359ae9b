"""Signing keys that stay in a PKCS#11 token (a smart card, an HSM, SoftHSM), through python-pkcs11.

A key is named by an RFC 7512 URI: `pkcs11:token=LABEL;object=LABEL;id=%01?module-path=FILE&pin-source=FILE`. Without
a `module-path` it is p11-kit's proxy, which knows the modules of the system. The PIN is the URI's pin-value or the
contents of its pin-source, else the environment's SWTPM_PKCS11_PIN, as swtpm has it.

To cryptography such a key is a private key like any other, that does nothing but sign.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn, Self
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

from crbd.errors import AuthorityError, UsageError
from crbd.provision.certificates import SigningKey

SCHEME: Final = "pkcs11:"
PIN_VARIABLE: Final = "SWTPM_PKCS11_PIN"
DEFAULT_MODULE: Final = "p11-kit-proxy.so"
_MAX_PIN: Final = 255
_TEST: Final = b"whose key is this?"


@dataclass(frozen=True, slots=True)
class TokenUri:
    """What names a key, and how it is reached."""

    token: str = ""
    serial: str = ""
    object_label: str = ""
    object_id: bytes = b""
    module: str = DEFAULT_MODULE
    pin: str | None = None

    @classmethod
    def parse(cls, text: str) -> TokenUri:
        """Raises UsageError. Attributes that are not known here (manufacturer, model, type) narrow nothing."""
        if not text.startswith(SCHEME):
            raise UsageError(f"{text!r} is no PKCS#11 URI", "it begins with pkcs11:")
        parts = urlsplit(text)
        path = dict(attribute.partition("=")[::2] for attribute in parts.path.split(";"))
        query = dict(attribute.partition("=")[::2] for attribute in parts.query.split("&"))
        if not (path.get("object") or path.get("id")):
            raise UsageError(f"{text!r} names no key", "give object=LABEL or id=%01")
        return cls(
            unquote(path.get("token", "")),
            unquote(path.get("serial", "")),
            unquote(path.get("object", "")),
            unquote_to_bytes(path.get("id", "")),
            unquote(query.get("module-path", "")) or DEFAULT_MODULE,
            _pin(query),
        )


def open_token_key(uri: TokenUri, certificate: x509.Certificate) -> SigningKey:
    """The private key that `uri` names and `certificate` belongs to. Raises AuthorityError."""
    public = certificate.public_key()
    if not isinstance(public, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
        raise AuthorityError("the issuer's certificate is for no RSA or ECC key", "use a key of one of these kinds")
    found = _find(uri, "RSA" if isinstance(public, rsa.RSAPublicKey) else "EC")
    key = TokenRsaKey(found, public) if isinstance(public, rsa.RSAPublicKey) else TokenEcKey(found, public)
    try:
        if isinstance(key, TokenRsaKey):
            signature = key.sign(_TEST, padding.PKCS1v15(), hashes.SHA256())
            key.public_key().verify(signature, _TEST, padding.PKCS1v15(), hashes.SHA256())
        else:
            algorithm = ec.ECDSA(hashes.SHA256())
            key.public_key().verify(key.sign(_TEST, algorithm), _TEST, algorithm)
    except InvalidSignature as error:
        raise AuthorityError(
            "the token's key and the issuer's certificate do not belong together", "name the key of that certificate"
        ) from error
    return key


class TokenRsaKey(rsa.RSAPrivateKey):
    """An RSA key in a token."""

    def __init__(self, key: Any, public: rsa.RSAPublicKey) -> None:
        self._key = key
        self._public = public

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def public_key(self) -> rsa.RSAPublicKey:
        return self._public

    def sign(self, data: Any, padding: Any, algorithm: Any) -> bytes:
        """PKCS #1 v1.5, with the hash made in the token. Raises AuthorityError."""
        pkcs11 = _library()
        with _refusals():
            mechanism = getattr(pkcs11.Mechanism, f"{algorithm.name.upper()}_RSA_PKCS")
            return bytes(self._key.sign(bytes(data), mechanism=mechanism))

    def decrypt(self, ciphertext: Any, padding: Any) -> NoReturn:
        raise _kept()

    def private_numbers(self) -> NoReturn:
        raise _kept()

    def private_bytes(self, *_: Any, **__: Any) -> NoReturn:
        raise _kept()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self


class TokenEcKey(ec.EllipticCurvePrivateKey):
    """An ECC key in a token."""

    def __init__(self, key: Any, public: ec.EllipticCurvePublicKey) -> None:
        self._key = key
        self._public = public

    @property
    def key_size(self) -> int:
        return self._public.key_size

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    def sign(self, data: Any, signature_algorithm: Any) -> bytes:
        """ECDSA in DER, with the hash made here. Raises AuthorityError."""
        pkcs11 = _library()
        digest = hashes.Hash(signature_algorithm.algorithm)
        digest.update(data)
        with _refusals():
            raw = self._key.sign(digest.finalize(), mechanism=pkcs11.Mechanism.ECDSA)
            return bytes(pkcs11.util.ec.encode_ecdsa_signature(raw))

    def exchange(self, algorithm: Any, peer_public_key: Any) -> NoReturn:
        raise _kept()

    def private_numbers(self) -> NoReturn:
        raise _kept()

    def private_bytes(self, *_: Any, **__: Any) -> NoReturn:
        raise _kept()

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def _find(uri: TokenUri, kind: str) -> Any:
    """The private key of that kind. The session stays open as long as the key is used."""
    pkcs11 = _library()
    with _refusals():
        try:
            module = pkcs11.lib(uri.module)
        except RuntimeError as error:
            raise AuthorityError(
                f"the PKCS#11 module {uri.module} cannot be loaded: {error}", "name one with ?module-path=FILE"
            ) from error
        wanted = {"token_label": uri.token or None, "token_serial": uri.serial.encode() or None}
        token = module.get_token(**{name: value for name, value in wanted.items() if value is not None})
        try:
            session = token.open(user_pin=uri.pin)
        except pkcs11.exceptions.UserAlreadyLoggedIn:
            # The whole process is, by another session.
            session = token.open()
        return session.get_key(
            object_class=pkcs11.ObjectClass.PRIVATE_KEY,
            key_type=getattr(pkcs11.KeyType, kind),
            label=uri.object_label or None,
            id=uri.object_id or None,
        )


def _library() -> Any:
    try:
        return import_module("pkcs11")
    except ImportError as error:
        raise AuthorityError(
            "keys in PKCS#11 tokens need python-pkcs11, which is not installed", "pip install 'crbd[pkcs11]'"
        ) from error


@contextmanager
def _refusals() -> Iterator[None]:
    """Translates python-pkcs11's errors, which mostly have nothing but a name."""
    try:
        yield
    except _library().exceptions.PKCS11Error as error:
        said = " ".join([type(error).__name__, *(str(argument) for argument in error.args)])
        raise AuthorityError(
            f"the PKCS#11 token refuses: {said}", "see to the token, the key's name and the PIN"
        ) from error


def _pin(query: dict[str, str]) -> str | None:
    if "pin-value" in query:
        return unquote(query["pin-value"])
    if "pin-source" in query:
        path = Path(unquote(query["pin-source"]).removeprefix("file:"))
        try:
            with path.open("rb") as file:
                return file.read(_MAX_PIN).decode().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"pin-source {path} cannot be read: {error}", "name a file that holds the PIN") from error
    return os.environ.get(PIN_VARIABLE)


def _kept() -> AuthorityError:
    return AuthorityError("a key in a PKCS#11 token can only sign", "use it for nothing else")
