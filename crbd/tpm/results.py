"""TPM_RESULT values of the control channel and of libtpms' calls (libtpms' tpm_error.h; 32 bits).

These are not TPM 2.0 response codes: those come from the TPM itself on the data channel (`crbd.tpm.codes`).
"""

from __future__ import annotations

from enum import IntEnum


class TpmResult(IntEnum):
    """The codes that crbd itself answers with."""

    SUCCESS = 0x000
    BAD_PARAMETER = 0x003
    FAIL = 0x009
    BAD_ORDINAL = 0x00A
    KEY_NOT_FOUND = 0x00D
    SIZE = 0x017
    IO_ERROR = 0x01F
    DECRYPT_ERROR = 0x021
    INVALID_POSTINIT = 0x026
    BAD_LOCALITY = 0x03D
    BAD_TYPE = 0x034
    BAD_VERSION = 0x02E
    RETRY = 0x800
