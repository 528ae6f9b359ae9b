#!/usr/bin/env python3
"""Reads a crbd state document by docs/state-format.md alone: prints its header and sections as JSON.

    read_state.py FILE [--key KEYFILE | --passphrase-file FILE] [--extract SECTION OUTPUT]

A second implementation, so that the format is what the page says and not what one program does. Needs Python 3.11 and,
for sealed documents, the package `cryptography`. It checks less than crbd does and is no part of it.
"""

import argparse
import hashlib
import hmac
import json
import struct
import sys
import uuid
from pathlib import Path

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError:
    AESGCM = None


def hkdf(key, salt, info):
    extracted = hmac.digest(salt, key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


def gcm_open(key, nonce, data, additional):
    if AESGCM is None:
        sys.exit("the document is sealed: install the package cryptography")
    try:
        return AESGCM(key).decrypt(nonce, data, additional)
    except InvalidTag:
        return None


def data_key(area, instance, key, passphrase):
    """The data key out of the key slots, by the key file's bytes or the passphrase's."""
    count, at = struct.unpack_from("<H", area, 4)[0], 6
    for _ in range(count):
        length = struct.unpack_from("<H", area, at)[0]
        slot, at = area[at + 2 : at + 2 + length], at + 2 + length
        kind, size = slot[0], 2 + slot[1] + {1: 16, 2: 19}.get(slot[0], 0)
        salt = slot[size - 16 : size]
        if kind == 1 and key:
            wrapping = hkdf(key, salt, b"crbd key slot")
        elif kind == 2 and passphrase:
            log2_n, r, p = slot[size - 19 : size - 16]
            wrapping = hashlib.scrypt(passphrase, salt=salt, n=1 << log2_n, r=r, p=p, maxmem=1 << 29, dklen=32)
        else:
            continue
        found = gcm_open(wrapping, slot[size : size + 12], slot[size + 12 :], b"crbd key slot" + instance + slot[:size])
        if found:
            if hmac.digest(hkdf(found, instance, b"crbd key slots"), area[:-32], "sha256") != area[-32:]:
                sys.exit("the key slots are not authentic")
            return found
    sys.exit("the document is sealed, and no key fits")


def read(document, key=None, passphrase=None):
    """Header (a dict) and sections (name, version, may-skip, data)."""
    whole, digest = document[:-32], document[-32:]
    if document[:8] != b"\x8aCRBD\r\n\x1a" or hashlib.sha256(whole).digest() != digest:
        sys.exit("not a state document, or damaged")
    fields = struct.unpack_from("<HHHHIQ16s16sQB", document, 8)
    version, oldest, suite, head_length, body_length, generation, instance, writer_id, written, size = fields
    if oldest > 3 or suite > 1:
        sys.exit("the document needs a newer reader")
    header = {
        "format_version": version,
        "oldest_reader": oldest,
        "suite": suite,
        "generation": generation,
        "uuid": str(uuid.UUID(bytes=instance)),
        "writer_id": writer_id.hex(),
        "written": written,
        "writer": document[69 : 69 + size].decode(),
    }
    body = whole[len(whole) - body_length :]
    if suite == 1:
        area = whole[head_length : len(whole) - body_length]
        body_key = hkdf(data_key(area, instance, key, passphrase), body[:32], b"crbd body")
        body = gcm_open(body_key, body[32:44], body[44:], document[:head_length])
        if body is None:
            sys.exit("header or body is not authentic")
    sections, at = [], 2
    for _ in range(struct.unpack_from("<H", body)[0]):
        name = body[at + 1 : at + 1 + body[at]].decode()
        at += 1 + body[at]
        number, flags, length = struct.unpack_from("<HHI", body, at)
        sections.append((name, number, bool(flags & 1), body[at + 8 : at + 8 + length]))
        at += 8 + length
    return header, sections


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--key", type=Path, help="file of 32 bytes")
    parser.add_argument("--passphrase-file", type=Path, help="every byte of it counts")
    parser.add_argument("--extract", nargs=2, metavar=("SECTION", "OUTPUT"))
    options = parser.parse_args()
    key = options.key.read_bytes() if options.key else None
    passphrase = options.passphrase_file.read_bytes() if options.passphrase_file else None
    header, sections = read(options.file.read_bytes(), key, passphrase)
    listed = [{"name": n, "version": v, "may_skip": skip, "bytes": len(data)} for n, v, skip, data in sections]
    print(json.dumps(header | {"sections": listed}, indent=2))
    if options.extract:
        Path(options.extract[1]).write_bytes({name: data for name, _, _, data in sections}[options.extract[0]])


if __name__ == "__main__":
    main()
