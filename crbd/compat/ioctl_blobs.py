"""`swtpm_ioctl --save` and `--load`: state blobs between a TPM and files."""

from __future__ import annotations

import os

from crbd.compat.ioctl_connection import ControlClient, carry_out
from crbd.control import messages as m
from crbd.control.spec import MAX_STATE_BLOB
from crbd.errors import DaemonError, UsageError
from crbd.tpm.results import TpmResult

TYPES = {"permanent": 1, "volatile": 2, "savestate": 3}
"""PTM_BLOB_TYPE_*."""


def save_blob(client: ControlClient, blob_type: str, path: str) -> None:
    """Write the blob of this type to the file, which is made (mode 0600) or loses what it held.

    Where the TPM has no such blob the file is empty. What the file held is kept until the blob is there. Raises
    UsageError for an unknown type or a file that cannot be written, DaemonError where the daemon hands out no blob.
    """
    number = _number(blob_type)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(f"Could not open file '{path}' for writing: {error.strerror}") from error
    with open(descriptor, "wb", buffering=0) as file:
        blob = _fetch(client, number)
        try:
            if file.seekable():
                file.truncate()
            written = memoryview(blob)
            while written:
                written = written[file.write(written) :]
        except OSError as error:
            raise UsageError(f"Could not write to file '{path}': {error.strerror}") from error


def load_blob(client: ControlClient, blob_type: str, path: str) -> None:
    """Hand the file's bytes to the TPM, which must be off, as its blob of this type.

    Raises UsageError for an unknown type or a file that cannot be read, DaemonError where the daemon refuses them.
    """
    number = _number(blob_type)
    try:
        with open(path, "rb") as file:
            blob = file.read(MAX_STATE_BLOB + 1)
    except OSError as error:
        raise UsageError(f"Could not open file '{path}' for reading: {error.strerror}") from error
    if len(blob) > MAX_STATE_BLOB:
        raise UsageError(f"File '{path}' is longer than a state blob may be ({MAX_STATE_BLOB} bytes).")
    carry_out(
        client, m.SetStateBlob(m.StateFlag(0), number, blob), m.Done, "PTM_SET_STATEBLOB", "ioctl PTM_SET_STATEBLOB"
    )


def _number(blob_type: str) -> int:
    if blob_type not in TYPES:
        raise UsageError(f"Unknown TPM state type '{blob_type}'")
    return TYPES[blob_type]


def _fetch(client: ControlClient, number: int) -> bytes:
    request = m.GetStateBlob(m.StateFlag.DECRYPTED, number, 0)
    reply = carry_out(client, request, m.StateBlob, "PTM_GET_STATEBLOB", "ioctl PTM_GET_STATEBLOB")
    if reply.result and not reply.result & TpmResult.RETRY:
        raise DaemonError(f"TPM result from PTM_GET_STATEBLOB: 0x{reply.result:x}")
    return reply.data
