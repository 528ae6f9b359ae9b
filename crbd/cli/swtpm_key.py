"""swtpm's own spelling of a key, as its `--key` takes it (swtpm 0.1 to 0.11: swtpm(8), common.c, key.c).

    file=PATH|fd=N [,format=hex|binary] [,mode=aes-cbc|aes-128-cbc|aes-256-cbc]
    pwdfile=PATH|pwdfd=N [,mode=…] [,kdf=pbkdf2|sha512]

Defaults: hexadecimal, AES-128, PBKDF2. `remove` is not taken: nothing here removes a key file.
"""

from __future__ import annotations

import os

from crbd.errors import UsageError
from crbd.state.swtpm_sealing import SwtpmKey

MAX_SIZE = 4096
"""Bytes of a key or passphrase at most."""
_SIZES = {"aes-cbc": 16, "aes-128-cbc": 16, "aes-256-cbc": 32}
_CHOICES = {"format": ("hex", "binary"), "mode": tuple(_SIZES), "kdf": ("pbkdf2", "sha512")}
_SOURCES = ("file", "fd", "pwdfile", "pwdfd")


def read_swtpm_key(text: str, option: str) -> SwtpmKey:
    """The key that `option`, with the value `text`, names. Raises UsageError."""
    settings = _settings(text, option)
    sources = [name for name in _SOURCES if name in settings]
    if len(sources) != 1:
        raise UsageError(f"{option} names {len(sources)} sources of a key", f"give one of {', '.join(_SOURCES)}")
    source = sources[0]
    passphrase = source.startswith("pwd")
    if ("format" if passphrase else "kdf") in settings:
        raise UsageError(f"{option}: {source}= goes without {'format' if passphrase else 'kdf'}=", "leave it out")
    size = _SIZES[settings.get("mode", "aes-cbc")]
    found = _read(settings[source], source, option)
    if passphrase:
        return SwtpmKey.from_passphrase(found, size, "sha512" if settings.get("kdf") == "sha512" else "pbkdf2")
    if settings.get("format", "hex") == "binary":
        return SwtpmKey.from_binary(found, size)
    return SwtpmKey.from_hex(found, size)


def _settings(text: str, option: str) -> dict[str, str]:
    settings: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals or not value or name in settings or name not in (*_SOURCES, *_CHOICES):
            raise UsageError(f"{option}: {part!r} means nothing there", "use swtpm's form: file=PATH,mode=aes-256-cbc")
        if name in _CHOICES and value not in _CHOICES[name]:
            raise UsageError(f"{option}: there is no {part}", f"{name} is {' or '.join(_CHOICES[name])}")
        settings[name] = value
    return settings


def _read(where: str, source: str, option: str) -> bytes:
    try:
        if source.endswith("fd"):
            if not where.isdecimal():
                raise UsageError(f"{option}: {source}={where} is no descriptor", "give its number")
            descriptor = int(where)
        else:
            descriptor = os.open(where, os.O_RDONLY | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            found = file.read(MAX_SIZE + 1)
    except OSError as error:
        raise UsageError(f"{option}: {source}={where}: {error.strerror}", "name one that this user may read") from error
    if not 0 < len(found) <= MAX_SIZE:
        raise UsageError(f"{option}: {source}={where} holds nothing, or more than {MAX_SIZE} bytes", "that is no key")
    return found
