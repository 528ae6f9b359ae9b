"""The names of TPM commands and response codes (TPM 2.0 Part 2, 6.5.2 and 6.6.3), for people who name them.

Without their prefixes TPM_CC_ and TPM_RC_. Of the response codes those that say nothing of a handle, a session or a
parameter: the others carry its number in them.
"""

from __future__ import annotations

from typing import Final

COMMANDS: Final = {
    "NV_UndefineSpaceSpecial": 0x11F,
    "EvictControl": 0x120,
    "HierarchyControl": 0x121,
    "NV_UndefineSpace": 0x122,
    "ChangeEPS": 0x124,
    "ChangePPS": 0x125,
    "Clear": 0x126,
    "ClearControl": 0x127,
    "ClockSet": 0x128,
    "HierarchyChangeAuth": 0x129,
    "NV_DefineSpace": 0x12A,
    "PCR_Allocate": 0x12B,
    "PCR_SetAuthPolicy": 0x12C,
    "PP_Commands": 0x12D,
    "SetPrimaryPolicy": 0x12E,
    "FieldUpgradeStart": 0x12F,
    "ClockRateAdjust": 0x130,
    "CreatePrimary": 0x131,
    "NV_GlobalWriteLock": 0x132,
    "GetCommandAuditDigest": 0x133,
    "NV_Increment": 0x134,
    "NV_SetBits": 0x135,
    "NV_Extend": 0x136,
    "NV_Write": 0x137,
    "NV_WriteLock": 0x138,
    "DictionaryAttackLockReset": 0x139,
    "DictionaryAttackParameters": 0x13A,
    "NV_ChangeAuth": 0x13B,
    "PCR_Event": 0x13C,
    "PCR_Reset": 0x13D,
    "SequenceComplete": 0x13E,
    "SetAlgorithmSet": 0x13F,
    "SetCommandCodeAuditStatus": 0x140,
    "FieldUpgradeData": 0x141,
    "IncrementalSelfTest": 0x142,
    "SelfTest": 0x143,
    "Startup": 0x144,
    "Shutdown": 0x145,
    "StirRandom": 0x146,
    "ActivateCredential": 0x147,
    "Certify": 0x148,
    "PolicyNV": 0x149,
    "CertifyCreation": 0x14A,
    "Duplicate": 0x14B,
    "GetTime": 0x14C,
    "GetSessionAuditDigest": 0x14D,
    "NV_Read": 0x14E,
    "NV_ReadLock": 0x14F,
    "ObjectChangeAuth": 0x150,
    "PolicySecret": 0x151,
    "Rewrap": 0x152,
    "Create": 0x153,
    "ECDH_ZGen": 0x154,
    "HMAC": 0x155,
    "MAC": 0x155,
    "Import": 0x156,
    "Load": 0x157,
    "Quote": 0x158,
    "RSA_Decrypt": 0x159,
    "HMAC_Start": 0x15B,
    "MAC_Start": 0x15B,
    "SequenceUpdate": 0x15C,
    "Sign": 0x15D,
    "Unseal": 0x15E,
    "PolicySigned": 0x160,
    "ContextLoad": 0x161,
    "ContextSave": 0x162,
    "ECDH_KeyGen": 0x163,
    "EncryptDecrypt": 0x164,
    "FlushContext": 0x165,
    "LoadExternal": 0x167,
    "MakeCredential": 0x168,
    "NV_ReadPublic": 0x169,
    "PolicyAuthorize": 0x16A,
    "PolicyAuthValue": 0x16B,
    "PolicyCommandCode": 0x16C,
    "PolicyCounterTimer": 0x16D,
    "PolicyCpHash": 0x16E,
    "PolicyLocality": 0x16F,
    "PolicyNameHash": 0x170,
    "PolicyOR": 0x171,
    "PolicyTicket": 0x172,
    "ReadPublic": 0x173,
    "RSA_Encrypt": 0x174,
    "StartAuthSession": 0x176,
    "VerifySignature": 0x177,
    "ECC_Parameters": 0x178,
    "FirmwareRead": 0x179,
    "GetCapability": 0x17A,
    "GetRandom": 0x17B,
    "GetTestResult": 0x17C,
    "Hash": 0x17D,
    "PCR_Read": 0x17E,
    "PolicyPCR": 0x17F,
    "PolicyRestart": 0x180,
    "ReadClock": 0x181,
    "PCR_Extend": 0x182,
    "PCR_SetAuthValue": 0x183,
    "NV_Certify": 0x184,
    "EventSequenceComplete": 0x185,
    "HashSequenceStart": 0x186,
    "PolicyPhysicalPresence": 0x187,
    "PolicyDuplicationSelect": 0x188,
    "PolicyGetDigest": 0x189,
    "TestParms": 0x18A,
    "Commit": 0x18B,
    "PolicyPassword": 0x18C,
    "ZGen_2Phase": 0x18D,
    "EC_Ephemeral": 0x18E,
    "PolicyNvWritten": 0x18F,
    "PolicyTemplate": 0x190,
    "CreateLoaded": 0x191,
    "PolicyAuthorizeNV": 0x192,
    "EncryptDecrypt2": 0x193,
    "AC_GetCapability": 0x194,
    "AC_Send": 0x195,
    "Policy_AC_SendSelect": 0x196,
    "CertifyX509": 0x197,
    "ACT_SetTimeout": 0x198,
    "ECC_Encrypt": 0x199,
    "ECC_Decrypt": 0x19A,
}
"""Two names of one code are the older and the newer one."""

RESPONSES: Final = {
    "INITIALIZE": 0x100,
    "FAILURE": 0x101,
    "SEQUENCE": 0x103,
    "DISABLED": 0x120,
    "EXCLUSIVE": 0x121,
    "AUTH_TYPE": 0x124,
    "AUTH_MISSING": 0x125,
    "POLICY": 0x126,
    "PCR": 0x127,
    "PCR_CHANGED": 0x128,
    "UPGRADE": 0x12D,
    "TOO_MANY_CONTEXTS": 0x12E,
    "AUTH_UNAVAILABLE": 0x12F,
    "REBOOT": 0x130,
    "UNBALANCED": 0x131,
    "COMMAND_SIZE": 0x142,
    "COMMAND_CODE": 0x143,
    "AUTHSIZE": 0x144,
    "AUTH_CONTEXT": 0x145,
    "NV_RANGE": 0x146,
    "NV_SIZE": 0x147,
    "NV_LOCKED": 0x148,
    "NV_AUTHORIZATION": 0x149,
    "NV_UNINITIALIZED": 0x14A,
    "NV_SPACE": 0x14B,
    "NV_DEFINED": 0x14C,
    "BAD_CONTEXT": 0x150,
    "CPHASH": 0x151,
    "PARENT": 0x152,
    "NEEDS_TEST": 0x153,
    "NO_RESULT": 0x154,
    "SENSITIVE": 0x155,
    "CONTEXT_GAP": 0x901,
    "OBJECT_MEMORY": 0x902,
    "SESSION_MEMORY": 0x903,
    "MEMORY": 0x904,
    "SESSION_HANDLES": 0x905,
    "OBJECT_HANDLES": 0x906,
    "LOCALITY": 0x907,
    "YIELDED": 0x908,
    "CANCELED": 0x909,
    "TESTING": 0x90A,
    "NV_RATE": 0x920,
    "LOCKOUT": 0x921,
    "RETRY": 0x922,
    "NV_UNAVAILABLE": 0x923,
}

_COMMANDS: Final = {name.lower(): code for name, code in COMMANDS.items()}
_RESPONSES: Final = {name.lower(): code for name, code in RESPONSES.items()}
_NAMES: Final = {code: name for name, code in reversed(COMMANDS.items())}


def command_named(name: str) -> int | None:
    """The code of a command, in any case and with or without TPM2_ or TPM_CC_; None where there is none."""
    plain = name.lower()
    for prefix in ("tpm2_cc_", "tpm_cc_", "tpm2_"):
        plain = plain.removeprefix(prefix)
    return _COMMANDS.get(plain)


def response_named(name: str) -> int | None:
    """The response code of that name, in any case, with - for _ and with or without TPM_RC_; None where none is."""
    plain = name.lower().replace("-", "_")
    for prefix in ("tpm2_rc_", "tpm_rc_"):
        plain = plain.removeprefix(prefix)
    return _RESPONSES.get(plain)


def name_of_command(code: int) -> str:
    """What to call a command: TPM2_GetRandom, or its code in hexadecimal."""
    name = _NAMES.get(code)
    return f"0x{code:08x}" if name is None else f"TPM2_{name}"
