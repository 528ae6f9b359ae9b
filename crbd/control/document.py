"""Writes docs/control-channel.md: `python -m crbd.control.document > docs/control-channel.md`.

The table comes from `crbd.control.spec`. The rules are prose; they stand here so that page and protocol lie side by
side.
"""

from __future__ import annotations

import sys

from crbd.control.replies import Capability
from crbd.control.spec import (
    CAPABILITIES,
    CODE_SIZE,
    COMMANDS,
    MAX_HASH_DATA,
    MAX_STATE_BLOB,
    PADDING,
    RESULT_SIZE,
    Command,
    Data,
    Layout,
    Number,
)


def _amount(count: int) -> str:
    """Bytes in the largest unit that leaves a whole number."""
    return f"{count >> 20} MiB" if count % (1 << 20) == 0 else f"{count >> 10} KiB"


_OPENING = """\
# The control channel

<!-- Written by `python -m crbd.control.document`; edit crbd/control/spec.py and crbd/control/document.py instead. -->

The control channel is swtpm's: QEMU, libvirt, swtpm_ioctl and swtpm_setup use it unchanged. One client at a time is
served, any number one after the other: a second one's first request waits until the first client is gone. Only crbd's
own commands (codes from 0xc0) are answered to any client at any time. All numbers are big-endian. A request is a
32-bit command code and a body; a reply is a 32-bit TPM_RESULT and, if that is 0, a body. An error reply is the result
alone, 4 bytes, with one exception: a refused GET_STATEBLOB is a whole head of 16 bytes, since QEMU reads that many
before it looks at the result.

"""

_LEGEND = """
*Request* and *success reply* give the whole size in bytes and what follows the code or the result. *TPM* is what the
TPM must be; otherwise the answer is TPM_BAD_ORDINAL. A command marked *at once* is answered while a TPM command
executes, without waiting for it.
"""

_RULES = f"""
## Results

| value | name | when |
|---|---|---|
| 0x000 | TPM_SUCCESS | |
| 0x003 | TPM_BAD_PARAMETER | SET_DATAFD came without a descriptor; a value that makes no sense |
| 0x009 | TPM_FAIL | SET_STATEBLOB of more than {_amount(MAX_STATE_BLOB)}; LOCK_STORAGE did not get the lock |
| 0x00a | TPM_BAD_ORDINAL | unknown command; the TPM is not what the command needs |
| 0x017 | TPM_SIZE | HASH_DATA of more than {_amount(MAX_HASH_DATA)} |
| 0x01f | TPM_IOERROR | SET_DATAFD, but there is a data channel already |
| 0x03d | TPM_BAD_LOCALITY | locality above 4, or one that is refused here |
| 0x800 | TPM_RETRY | GET_STATEBLOB: there is no such state |

Other results come from libtpms as they are.

## Where crbd is kinder than swtpm

- A request may come in pieces of any size, and several may come in one read: each is answered, in order. swtpm answers
  the first and drops the rest, or refuses it (TPM_BAD_PARAMETER) because bytes follow.
- SET_LOCALITY and RESET_TPMESTABLISHED may be followed by {PADDING} bytes of any value (QEMU sends the whole C union).
  Without or with them, in one write or cut anywhere, the next request is found. Waiting for these bytes is not a stall.
- Other bytes behind complete requests in the same read that do not begin with a known code are ignored.
- CANCEL_TPM_CMD takes effect while the command executes, not after it.
- A refused GET_STATEBLOB is always 16 bytes. swtpm sends 4 if the TPM is not running, and QEMU then waits for ever.
- A request that is not carried out, because the TPM is not what it needs, is still read to its end: its data is never
  taken for the next request.

## Where crbd is stricter than swtpm

- HASH_DATA carries at most {_amount(MAX_HASH_DATA)}; swtpm has no limit. It is hashed when all of it is there: a client
  that stops in the middle leaves the TPM as it was.
- A length above its limit is answered (TPM_SIZE for HASH_DATA, TPM_FAIL for SET_STATEBLOB) and the connection closed,
  as what follows could only be taken for requests. swtpm answers SET_STATEBLOB and reads on.
- SET_STATEBLOB with fewer bytes than it declares has no effect, and the client is dropped after a time.
- Descriptors that come with other requests, or beyond the first, are closed at once.
"""


def page() -> str:
    """The whole page, ending with a newline."""
    rows = [
        "| code | command | request | success reply | TPM | at once | capability | |",
        "|---|---|---|---|---|---|---|---|",
        *(_row(command) for command in COMMANDS),
    ]
    header = f"0x{Capability.SEND_COMMAND_HEADER:05x}, the command header of the data channel"
    word = f"\nGET_CAPABILITY answers 0x{CAPABILITIES:05x}: all of these and {header}.\n"
    return _OPENING + "\n".join(rows) + "\n" + _LEGEND + word + _RULES


def _row(command: Command) -> str:
    cells = (
        f"0x{command.code:02x}",
        command.name,
        _shape(CODE_SIZE, command.body),
        _shape(RESULT_SIZE, command.reply_body),
        command.needs.value,
        "yes" if command.while_executing else "",
        f"0x{command.capability:05x}" if command.capability else "",
        command.doc,
    )
    return "| " + " | ".join(cells) + " |"


def _shape(head: int, layout: Layout) -> str:
    """Size and fields, as `8: u32 flags`."""
    fields: list[str] = []
    for field in layout.fields:
        match field:
            case Number(name, size):
                fields.append(f"u{8 * size} {name}")
            case Data(name, limit):
                fields.append(f"u32 count, {name} (at most {_amount(limit)})")
            case unused:
                fields.append(f"{unused.size} unused")
    total = f"{head + layout.fixed}" + (" + count" if layout.data else "")
    return f"{total}: {', '.join(fields)}" if fields else total


if __name__ == "__main__":
    sys.stdout.write(page())
