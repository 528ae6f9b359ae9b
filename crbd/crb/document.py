"""Writes docs/crb-registers.md: `python -m crbd.crb.document > docs/crb-registers.md`.

The tables come from `crbd.crb.spec` and `crbd.crb.states`; the words around them stand here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from crbd.crb import states
from crbd.crb.config import CrbConfig
from crbd.crb.spec import REGISTERS, Access, Field, Register, reset_words
from crbd.crb.states import Request, State

_HEAD = """\
# The CRB registers

<!-- Generated: python -m crbd.crb.document > docs/crb-registers.md -->

crbd keeps one register file per TPM, after the TCG PC Client Platform TPM Profile (PTP), and every command goes
through it: those of a guest's driver by registers, those of the data channel by the one call that stands for a
driver's writes. So the registers tell at every moment what the TPM does.

All registers are little-endian. Offsets count from the beginning of a locality's page; locality n's page is at base
+ n · 0x1000, and PC firmware looks for the base at 0xFED40000.
"""

_ACCESS = """\
A read never changes anything. What a write does, by the register's access:
"""

_WRITES = """\
An access of 8 bytes, or one that is not aligned, is cut into naturally aligned pieces of 1, 2 and 4 bytes, in
ascending order. A piece acts on a register only if it begins where the register begins, and with the value of its
own lanes: a byte written to CTRL_START + 1 does nothing. The requests of LOC_CTRL and CTRL_REQ count alone: two
bits at once are no request.
"""

_STATES = """\
## The states

    IDLE --cmdReady--> READY --START--> EXECUTION --response or failure--> COMPLETION
     ^                 |   ^                                              |    |
     +-----goIdle------+   +----------cmdReady (idle bypass)--------------+    |
     +---------------------------------goIdle----------------------------------+

Ready includes Command Reception: it begins with the first byte in the buffer, which may be plain memory, so nobody
sees it begin. START stays set from the write until the response (or the failure) is there, and CANCEL reaches the
TPM only then.

In the tables, `-` means that the request is ignored.
"""

_QEMU = """\
QEMU's device keeps tpmIdle and Start as two independent bits and knows no Completion: a START in Idle executes, and
goIdle during execution shows tpmIdle at once. crbd behaves like that where it stands in for QEMU's device (dialects
`qemu-7.2` and `qemu-11`), because a guest that was frozen there must find the same device again.
"""

_RULES = """\
What the diagram does not say:

- **tpmSts** is set by a command that cannot be carried out, or that says it is shorter than its head of 10 bytes;
  only a reset clears it. Commands are executed all the same.
- **A command longer than the buffer** comes in pieces: nextChunk appends the buffer, START appends the rest and
  executes. A longer response is shown piece by piece by nextChunk, and from its beginning by crbRspRetry. Of several
  bits of CTRL_START the first of Start, nextChunk and crbRspRetry counts. A device without chunks takes the buffer's
  length of a command, and the TPM answers that it is cut short.
- **Leaving Completion** clears the buffer, and what has been transferred so far is forgotten. QEMU does neither.
- **Cancel** outside execution forgets what has been transferred. It reads back until 0 is written (QEMU: reads 0).

## Localities

LOC_STATE reads the same on every page. The control area and the buffer belong to the locality that activeLocality
names; they show on its page and obey it alone. The other pages show reset values there.

- requestAccess grants the TPM where nobody has it; otherwise the locality waits. Of those that wait the highest
  gets it next.
- seize takes it from a lower locality. A command that executes is cancelled first, and its response is thrown away;
  LOC_STS.beenSeized tells the loser, until it is granted the TPM again. A device with one locality has nothing to
  seize.
- When the TPM goes to another locality, interface and buffer are cleared: no locality sees what another left.
- Locality 4 has HASH_START, HASH_DATA and HASH_END in LOC_CTRL instead. HASH_START takes the TPM at once. HASH_DATA
  finds in the buffer a 16-bit little-endian count and that many bytes, as processors with Intel TXT write them.
- resetEstablishmentBit counts at localities 3 and 4.
"""

_MAPPINGS = """\
## Ways to map it, and why there are several

**Split** is QEMU's device on x86: the registers 0x00 to 0x7F trap on reads and writes, the buffer behind them is a
RAM block called `tpm-crb-cmd`. A saved machine holds 32 register words and that block.

**Page** is for guests whose reads cannot be trapped. Windows on AArch64 reads registers with LDP, 16 bytes in one
instruction; for that the processor gives the hypervisor no syndrome, so there is nothing to decode and nothing to
emulate. The way out is to let the guest read memory: the page is mapped read-only, only writes trap, and of those
nobody does a pair. A saved machine holds one page.

**Served** is for register servers (vfio-user): the pages trap, the data buffer is shared memory behind them, and
CTRL_CMD_LADDR/HADDR and the 64-bit CTRL_RSP_ADDR point there.

The three cannot be told apart by a guest, because no read has a side effect. The one field that looks as if it had,
tpmEstablished, changes when the TPM's flag changes and not when somebody reads it. So there is one device, and a
mapping is a few lines that route accesses; a property test drives the same life through all three and wants equal
registers, effects and responses.

The story behind: a device model that moved from split to page could not resume machines saved before. *Unknown
ramblock "tpm-crb-cmd", cannot accept migration*: the saved form was whatever memory the mapping happened to have.
Here the saved form is a thing of its own (`crbd.state.crb`): version 1 is the split mapping's, version 2 the
page's, version 3 adds localities and the pieces of a transfer. Every later release reads all of them; an older form
is written only where it says everything, and otherwise refused. A saved page that could never occur is refused with
the register named.
"""


def render() -> str:
    """The whole document."""
    parts = [
        _HEAD,
        "## The registers\n",
        _table(("offset", "register", "access", "shows on", "after reset", "meaning"), map(_register_row, REGISTERS)),
        _ACCESS,
        "\n".join(f"- *{access.value}*: {_ACCESS_MEANING[access]}" for access in Access) + "\n",
        _WRITES,
        "## The fields\n",
        _table(("register", "bits", "field", "reset", "meaning"), _field_rows()),
        "## Reset values of known devices\n",
        _table(("offset", "qemu-7.2", "qemu-11", "crbd, locality 0"), _reset_rows()),
        "All other words are 0.\n",
        _STATES,
        "With idle bypass (INTF_ID.CapCRBIdleBypass = 1):\n",
        _transitions(states.PTP_BYPASS),
        "Without:\n",
        _transitions(states.PTP),
        "QEMU's:\n",
        _transitions(states.QEMU),
        _QEMU,
        _RULES,
        _MAPPINGS,
    ]
    return "\n".join(parts)


_ACCESS_MEANING = {
    Access.READ_ONLY: "nothing.",
    Access.COMMAND: "asks for something and leaves no trace; the register reads 0.",
    Access.HELD: "a written 1 stays until the device clears it.",
    Access.STORED: "reads back what was written, in the fields that there are. On QEMU's devices it reads 0.",
}


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _register_row(register: Register) -> tuple[str, ...]:
    offset = f"0x{register.offset:02X}"
    width = "" if register.size == 4 else f" ({8 * register.size} bits)"
    words = reset_words(CrbConfig(), 0)
    value = words[register.offset // 4] | (words[register.offset // 4 + 1] << 32 if register.size == 8 else 0)
    return offset, register.name + width, register.access.value, register.scope.value, f"0x{value:X}", register.meaning


def _field_rows() -> Iterable[tuple[str, ...]]:
    for register in REGISTERS:
        for field in register.fields:
            yield register.name, _bits(field), field.name, _reset(field), field.meaning


def _bits(field: Field) -> str:
    return str(field.low) if field.width == 1 else f"{field.low}-{field.low + field.width - 1}"


def _reset(field: Field) -> str:
    return str(field.reset) if isinstance(field.reset, int) else field.reset.describes


def _reset_rows() -> Iterable[tuple[str, ...]]:
    devices = [reset_words(config, 0) for config in (CrbConfig.qemu_7_2(), CrbConfig.qemu_11(), CrbConfig())]
    for index, words in enumerate(zip(*devices, strict=True)):
        if any(words):
            yield f"0x{4 * index:02X}", *(f"0x{word:08X}" for word in words)


def _transitions(rows: states.Transitions) -> str:
    known = [state for state in State if any(state in (start, end) for (start, _), end in rows.items())]
    return _table(
        ("in", *(request.value for request in Request)),
        ((state.name, *(_name(rows.get((state, request))) for request in Request)) for state in known),
    )


def _name(state: State | None) -> str:
    return "-" if state is None else state.name


if __name__ == "__main__":
    sys.stdout.write(render())
