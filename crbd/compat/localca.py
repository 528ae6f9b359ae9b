"""`swtpm_localca`: certificates of a TPM from a local authority, which is made at first use.

Options, files and exit status are those of swtpm 0.11; the certificates are made in this process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from crbd.compat.cert import write_certificate
from crbd.compat.cert_options import KINDS
from crbd.compat.ioctl_options import Arguments, Complaint, Operand
from crbd.compat.localca_signer import open_localca
from crbd.compat.setup_log import Log
from crbd.errors import OperatorError, UsageError

FLAGS: Final = ("tpm2", "allow-signing", "decryption", "help")
PASSED_ON: Final = (
    *("tpm-spec-family", "tpm-spec-revision", "tpm-spec-level"),
    *("tpm-manufacturer", "tpm-model", "tpm-version", "tpm-serial-num"),
)
NAMES: Final = {
    **dict.fromkeys(("type", "ek", "key", "dir", "vmid", "optsfile", "configfile", "logfile", *PASSED_ON), True),
    **dict.fromkeys(FLAGS, False),
}
"""Every option, and whether it takes a value."""
HELP: Final = """Usage: swtpm_localca [options]

--type <type>         ek, platform, iak or idevid
--ek <key>            the key: the modulus of an RSA key in hexadecimal digits, or x=<hex>,y=<hex>,id=<curve>
--key <key>           the same
--dir <directory>     where the certificate is put, as <type>.cert; default: the current directory
--vmid <name>         name of the virtual machine, for the subject
--configfile <file>   where the authority's files are; see swtpm-localca.conf(5)
--optsfile <file>     options of swtpm_cert for all certificates
--logfile <file>      write messages there
--tpm-spec-family <text>, --tpm-spec-revision <number>, --tpm-spec-level <number>
--tpm-manufacturer <text>, --tpm-model <text>, --tpm-version <text>
--tpm-serial-num <text>  for types iak and idevid
--tpm2                for a TPM 2; needed
--allow-signing       the EK can sign
--decryption          the EK can decrypt; the default without --allow-signing
--help, -h

Environment: SWTPM_ROOTCA_PASSWORD, the password of the root authority's key
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 0, or 1 with the reason in the log or on stderr."""
    values: dict[str, str] = {}
    flags: set[str] = set()
    for argument in Arguments(sys.argv[1:] if argv is None else argv, NAMES):
        if isinstance(argument, Complaint):
            print(f"swtpm_localca: {argument.text}", file=sys.stderr)
            sys.stdout.write(HELP)
            return 1
        if isinstance(argument, Operand):
            continue
        if argument.name == "help":
            sys.stdout.write(HELP)
            return 0
        if NAMES[argument.name]:
            values[argument.name] = argument.value
            if argument.name == "key":
                values["ek"] = argument.value
        else:
            flags.add(argument.name)
    log = Log()
    try:
        log = Log.open(values.get("logfile", ""))
        _certify(values, flags, log)
    except OperatorError as error:
        log.complain(str(error))
        return 1
    return 0


def _certify(values: dict[str, str], flags: set[str], log: Log) -> None:
    if "tpm2" not in flags:
        raise UsageError("Certificates for a TPM 1.2 need SHA-1 signatures, which are not made any more. Use --tpm2.")
    signer = open_localca(values.get("configfile", ""), values.get("optsfile", ""), log)
    options = [word for name in PASSED_ON if name in values for word in (f"--{name}", values[name])]
    kind = values.get("type", "ek")
    if kind == "ek":
        options += [f"--{name}" for name in ("allow-signing", "decryption") if name in flags]
    der = signer.issue(kind, values.get("ek", ""), values.get("vmid", ""), options)
    made = kind if kind in KINDS else "ek"
    write_certificate(Path(values.get("dir", "."), f"{made}.cert"), der)
