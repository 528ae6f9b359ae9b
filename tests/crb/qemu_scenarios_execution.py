"""What is done to QEMU's device: commands in execution, chunked ones, and a real TPM.

The docstring of each goes into its trace.
"""

from __future__ import annotations

from .qemu_machine import BUFFER, CTRL_START
from .qemu_recorder import (
    BUFFER_SIZE,
    CMD_READY,
    CTRL_CANCEL,
    CTRL_REQ,
    GO_IDLE,
    LOC_CTRL,
    NEXT_CHUNK,
    RELINQUISH,
    REQUEST_ACCESS,
    RSP_RETRY,
    START,
    DaemonRecorder,
    ScriptedRecorder,
    tpm_bytes,
)
from .qemu_scenarios import COMMAND, RESPONSE

STARTUP = bytes.fromhex("80010000000c000001440000")
GET_RANDOM_16 = bytes.fromhex("80010000000c0000017b0010")
GET_FIXED_PROPERTIES = bytes.fromhex("8001000000160000017a000000060000010000000040")


def create_primary(key_bits: int) -> bytes:
    """TPM2_CreatePrimary of an RSA storage key in the owner hierarchy (TPM 2.0 Part 3, 24.1)."""
    public = b"".join(
        (
            bytes.fromhex("0001000b000300720000"),  # RSA, SHA-256, restricted decryption key, no policy
            bytes.fromhex("0006008000430010"),  # AES-128-CFB, no scheme
            key_bits.to_bytes(2, "big") + bytes(4) + bytes(2),
        )
    )
    body = b"".join(
        (
            bytes.fromhex("40000001"),
            bytes.fromhex("00000009400000090000000000"),
            bytes.fromhex("000400000000"),
            len(public).to_bytes(2, "big") + public,
            bytes(2) + bytes(4),
        )
    )
    return b"\x80\x02" + (10 + len(body)).to_bytes(4, "big") + bytes.fromhex("00000131") + body


# ---- with the scripted TPM ----


def start_without_locality(rec: ScriptedRecorder) -> None:
    """START while no access is granted is ignored: in idle, in ready, after relinquish; then once with access."""
    rec.write_bytes(BUFFER, COMMAND)
    rec.write(CTRL_START, START)
    rec.look(buffer=32)
    rec.write(CTRL_REQ, CMD_READY)
    rec.write(CTRL_START, START)
    rec.look()
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.write(LOC_CTRL, RELINQUISH)
    rec.write(CTRL_START, START)
    rec.look(buffer=32)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.start(COMMAND)
    rec.look()
    rec.complete(RESPONSE)
    rec.look(buffer=32)


def start_in_idle(rec: ScriptedRecorder) -> None:
    """START with access granted but without cmdReady, and again without cmdReady after the response."""
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    for seed in range(2):
        rec.start(tpm_bytes(12, code=0x17B, seed=seed))
        rec.look()
        rec.complete(RESPONSE)
        rec.look(buffer=64)
    rec.write(CTRL_REQ, GO_IDLE)
    rec.start(COMMAND)
    rec.complete(RESPONSE)
    rec.look(buffer=64)


def accesses_in_execution(rec: ScriptedRecorder) -> None:
    """In execution: START again, cmdReady, goIdle, relinquish, request, seize, writes to plain registers."""
    rec.make_ready()
    for register, value in (
        *((CTRL_START, START), (CTRL_START, 0), (CTRL_START, RSP_RETRY), (CTRL_START, NEXT_CHUNK), (CTRL_START, 7)),
        *((CTRL_REQ, CMD_READY), (CTRL_REQ, GO_IDLE), (LOC_CTRL, REQUEST_ACCESS), (LOC_CTRL, 4)),
        *((LOC_CTRL, RELINQUISH), (0x50, 0x8000000F), (0x58, 0x1000)),
    ):
        rec.make_ready()
        rec.start(COMMAND)
        rec.write(register, value)
        rec.look()
        rec.complete(RESPONSE)
        rec.look(buffer=32)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.start(COMMAND)
    rec.write(LOC_CTRL, RELINQUISH)
    rec.write(CTRL_START, START)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.write(CTRL_START, START)
    rec.look()
    rec.complete(RESPONSE)
    rec.look(buffer=32)


def buffer_in_execution(rec: ScriptedRecorder) -> None:
    """Reads of and writes to the data buffer in execution, in the head and behind; a response longer and shorter."""
    rec.make_ready()
    for size in (28, 10, 200):
        rec.start(tpm_bytes(100, code=0x17B))
        rec.read(BUFFER, 128)
        rec.write(BUFFER, 0xFFFFFFFF)
        rec.write(BUFFER + 8, 0x1122334455667788, 8)
        rec.write(BUFFER + 99, 0xEE, 1)
        rec.write_bytes(BUFFER + 0xF00, b"\xdd" * 0x80)
        rec.read(BUFFER, BUFFER_SIZE)
        rec.complete(tpm_bytes(size, code=0, seed=0xA0))
        rec.look(buffer=BUFFER_SIZE)


def cancel(rec: ScriptedRecorder) -> None:
    """CTRL_CANCEL with every kind of value: before, in and after execution, without access, in partial accesses."""
    canceled = tpm_bytes(10, code=0x909)
    for value in (1, 0, 2, 0xFFFFFFFF, 1):
        rec.write(CTRL_CANCEL, value)
        rec.look()
    rec.make_ready()
    for value, width in ((1, 4), (0, 4), (2, 4), (3, 4), (0xFFFFFFFF, 4), (1, 1), (1, 2), (1, 8)):
        rec.start(COMMAND)
        rec.write(CTRL_CANCEL, value, width)
        rec.look()
        rec.complete(canceled)
        rec.look(buffer=16)
        rec.write(CTRL_CANCEL, 0)
    rec.start(COMMAND)
    for _ in range(3):
        rec.write(CTRL_CANCEL, 1)
    rec.write(CTRL_CANCEL + 1, 1, 1)
    rec.write(LOC_CTRL, RELINQUISH)
    rec.write(CTRL_CANCEL, 1)
    rec.look()
    rec.complete(canceled)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.write(CTRL_CANCEL, 1)
    rec.start(COMMAND)
    rec.complete(RESPONSE)
    rec.look(buffer=32)


def command_sizes(rec: ScriptedRecorder) -> None:
    """Commands whose head declares less than a head, a head, the buffer, more than the buffer, more than the TPM's."""
    for size in (0, 1, 9, 10, 11, 0xF7F, 0xF80, 0xF81, 0x1000, 0x1001, 0x10000, 0x80000000, 0xFFFFFFFF):
        rec.reset()
        rec.make_ready()
        rec.write_bytes(BUFFER, tpm_bytes(BUFFER_SIZE, code=0x17B, declared=size))
        rec.write(CTRL_START, START)
        rec.look()
        if rec.executing:
            rec.await_bytes(min(size, BUFFER_SIZE))
            rec.complete(RESPONSE)
        rec.look(buffer=32)
        rec.write(CTRL_REQ, GO_IDLE)
        rec.look()
        rec.write(CTRL_REQ, CMD_READY)
        rec.start(COMMAND)
        rec.complete(RESPONSE)
        rec.look(buffer=32)


def response_sizes(rec: ScriptedRecorder) -> None:
    """Responses of a bare head, a few bytes and up to the whole buffer: what is left behind them."""
    rec.make_ready()
    for size in (10, 11, 4, 100, 0xF7F, 0xF80, 10):
        rec.start(COMMAND)
        rec.complete(tpm_bytes(max(size, 10), code=0, seed=size & 0xFF))
        rec.look(buffer=BUFFER_SIZE)


def failure(rec: ScriptedRecorder) -> None:
    """The TPM breaks in execution: tpmSts. Then goIdle, cmdReady, relinquish, a further START, and resets."""
    rec.make_ready()
    rec.start(tpm_bytes(100, code=0x17B))
    rec.fail()
    rec.look(buffer=128)
    for register, value in (
        *((CTRL_REQ, GO_IDLE), (CTRL_REQ, CMD_READY), (LOC_CTRL, RELINQUISH), (LOC_CTRL, REQUEST_ACCESS)),
        *((CTRL_CANCEL, 1), (CTRL_START, 0), (CTRL_START, RSP_RETRY), (CTRL_START, NEXT_CHUNK)),
    ):
        rec.write(register, value)
        rec.look()
    rec.write_bytes(BUFFER, COMMAND)
    rec.write(CTRL_START, START)
    rec.fail()
    rec.look(buffer=128)
    rec.reset()
    rec.look(buffer=32)
    rec.make_ready()
    rec.write_bytes(BUFFER, COMMAND)
    rec.write(CTRL_START, START)
    rec.fail()
    rec.look(buffer=32)


# ---- chunked transfers, QEMU 11.1 ----


def chunk_bits(rec: ScriptedRecorder) -> None:
    """nextChunk and crbRspRetry in a command's way and in its response's, whether the device knows them or not."""
    rec.make_ready()
    command = tpm_bytes(4096, code=0x17B)
    rec.write_bytes(BUFFER, command[:BUFFER_SIZE])
    rec.write(CTRL_START, NEXT_CHUNK)
    rec.look(buffer=16)
    rec.write_bytes(BUFFER, COMMAND)
    rec.write(CTRL_START, START)
    rec.await_bytes(len(COMMAND))
    rec.complete(tpm_bytes(100, code=0, seed=0xA0))
    for value in (RSP_RETRY, NEXT_CHUNK, RSP_RETRY | NEXT_CHUNK):
        rec.write_bytes(BUFFER, b"\xee" * 16)
        rec.write(CTRL_START, value)
        rec.look(buffer=128)


def send_chunks(rec: ScriptedRecorder, command: bytes) -> None:
    """A command in as many pieces as it takes: nextChunk behind each but the last, START behind that."""
    pieces = [command[start : start + BUFFER_SIZE] for start in range(0, len(command), BUFFER_SIZE)]
    for piece in pieces[:-1]:
        rec.write_bytes(BUFFER, piece)
        rec.write(CTRL_START, NEXT_CHUNK)
        rec.look(buffer=16)
    rec.write_bytes(BUFFER, pieces[-1])
    rec.write(CTRL_START, START)
    rec.look()
    rec.await_bytes(len(command))


def chunks(rec: ScriptedRecorder) -> None:
    """Commands and responses of two and three pieces; a response's end and what nextChunk does behind it."""
    rec.make_ready()
    for command_size, response_size in (
        (0xF81, 28),
        (12, 0xF81),
        (4096, 4096),
        (8192, 8192),
        (8192, 10),
        (0xF80, 0xF80),
    ):
        rec.write(CTRL_REQ, CMD_READY)
        send_chunks(rec, tpm_bytes(command_size, code=0x17B))
        rec.complete(tpm_bytes(response_size, code=0, seed=0xA0))
        rec.look(buffer=BUFFER_SIZE)
        for _ in range((response_size - 1) // BUFFER_SIZE):
            rec.write(CTRL_START, NEXT_CHUNK)
            rec.look(buffer=BUFFER_SIZE)
        rec.write(CTRL_REQ, GO_IDLE)


def chunk_retry(rec: ScriptedRecorder) -> None:
    """crbRspRetry behind each piece of a response, behind the last one, twice, after goIdle, after relinquish."""
    rec.make_ready()
    rec.write(CTRL_START, RSP_RETRY)
    rec.look(buffer=16)
    rec.start(COMMAND)
    rec.complete(tpm_bytes(8192, code=0, seed=0xA0))
    for value in (
        *(RSP_RETRY, NEXT_CHUNK, RSP_RETRY, NEXT_CHUNK, NEXT_CHUNK, RSP_RETRY, RSP_RETRY, NEXT_CHUNK),
        *(RSP_RETRY | NEXT_CHUNK, NEXT_CHUNK, NEXT_CHUNK),
    ):
        rec.write(CTRL_START, value)
        rec.look(buffer=16)
        rec.read(BUFFER + 240, 32)
    rec.write(CTRL_REQ, GO_IDLE)
    rec.write(CTRL_START, RSP_RETRY)
    rec.look(buffer=16)
    rec.write(LOC_CTRL, RELINQUISH)
    for value in (NEXT_CHUNK, RSP_RETRY):
        rec.write(CTRL_START, value)
        rec.look(buffer=16)
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.write(CTRL_START, NEXT_CHUNK)
    rec.look(buffer=16)


def chunk_overrun(rec: ScriptedRecorder) -> None:
    """nextChunk behind a response's last piece: QEMU takes the buffer for a command's first piece."""
    rec.make_ready()
    rec.start(COMMAND)
    rec.complete(tpm_bytes(0xF90, code=0, seed=0xA0))
    for _ in range(4):
        rec.write(CTRL_START, NEXT_CHUNK)
        rec.look(buffer=32)
    rec.reset()
    rec.make_ready()
    rec.start(COMMAND)
    rec.complete(RESPONSE)
    rec.write(CTRL_START, NEXT_CHUNK)
    rec.look(buffer=32)
    rec.write(CTRL_START, RSP_RETRY)
    rec.look(buffer=32)
    rec.write_bytes(BUFFER, tpm_bytes(16, code=0x17B))
    rec.write(CTRL_START, START)
    rec.await_bytes(len(RESPONSE))
    rec.complete(RESPONSE)
    rec.look(buffer=32)


def chunk_abandoned(rec: ScriptedRecorder) -> None:
    """A command given up after its first piece: by goIdle, cmdReady, relinquish or a reset, then a short command."""
    for register, value in ((CTRL_REQ, GO_IDLE), (CTRL_REQ, CMD_READY), (LOC_CTRL, RELINQUISH), (None, 0)):
        rec.reset()
        rec.make_ready()
        rec.write_bytes(BUFFER, tpm_bytes(BUFFER_SIZE, code=0x17B, declared=0xF90))
        rec.write(CTRL_START, NEXT_CHUNK)
        if register is None:
            rec.reset()
        else:
            rec.write(register, value)
        rec.look()
        rec.make_ready()
        rec.write_bytes(BUFFER, COMMAND)
        rec.write(CTRL_START, START)
        rec.await_bytes(len(COMMAND) if register is None else 0xF90)
        rec.complete(RESPONSE)
        rec.look(buffer=32)
        rec.start(COMMAND)
        rec.complete(RESPONSE)
        rec.look(buffer=32)


def chunk_errors(rec: ScriptedRecorder) -> None:
    """First pieces whose head declares too little or too much; pieces without access; too many pieces; a failure."""
    for size in (0, 9, 10, 0xF80, 0x2001, 0xFFFFFFFF):
        rec.reset()
        rec.write_bytes(BUFFER, tpm_bytes(BUFFER_SIZE, code=0x17B, declared=size))
        rec.write(CTRL_START, NEXT_CHUNK)
        rec.look()
        rec.make_ready()
        for _ in range(4):
            rec.write(CTRL_START, NEXT_CHUNK)
            rec.look()
        rec.write(CTRL_START, START)
        rec.look()
        if rec.executing:
            rec.await_bytes(min(size, 8192))
            rec.complete(RESPONSE)
            rec.look(buffer=32)
    rec.reset()
    rec.make_ready()
    send_chunks(rec, tpm_bytes(4096, code=0x17B))
    rec.fail()
    rec.look(buffer=32)
    for value in (NEXT_CHUNK, RSP_RETRY):
        rec.write(CTRL_START, value)
        rec.look(buffer=32)


def chunk_limit_4096(rec: ScriptedRecorder) -> None:
    """With a TPM of 4096 bytes, as libtpms is: the longest command and response, and heads that declare more."""
    for size in (4096, 4097, 8192):
        rec.reset()
        rec.make_ready()
        command = tpm_bytes(size, code=0x17B)
        rec.write_bytes(BUFFER, command[:BUFFER_SIZE])
        rec.write(CTRL_START, NEXT_CHUNK)
        rec.look()
        rec.write_bytes(BUFFER, command[BUFFER_SIZE : 2 * BUFFER_SIZE])
        rec.write(CTRL_START, START)
        rec.look()
        rec.await_bytes(4096)
        rec.complete(tpm_bytes(4096, code=0, seed=0xA0))
        rec.look(buffer=BUFFER_SIZE)
        rec.write(CTRL_START, NEXT_CHUNK)
        rec.look(buffer=BUFFER_SIZE)


# ---- with a real TPM ----


def commands(rec: DaemonRecorder) -> None:
    """TPM2_Startup, TPM2_GetRandom of 16 bytes, TPM2_GetCapability of the fixed properties, as a driver sends them."""
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.look()
    for command in (STARTUP, GET_RANDOM_16, GET_FIXED_PROPERTIES):
        response = rec.run(command)
        assert response[6:10] == bytes(4), f"{command.hex()} was answered by {response.hex()}"
    rec.write(LOC_CTRL, RELINQUISH)
    rec.look()


def long_commands(rec: DaemonRecorder) -> None:
    """RSA-2048 and RSA-3072 TPM2_CreatePrimary; the latter cancelled in execution, then a command as if nothing was."""
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.run(STARTUP)
    response = rec.run(create_primary(2048))
    assert response[6:10] == bytes(4), response.hex()
    handle = response[10:14]
    rec.run(bytes.fromhex("80010000000e00000165") + handle)
    rec.write(CTRL_REQ, CMD_READY)
    rec.write_bytes(BUFFER, create_primary(3072))
    rec.write(CTRL_START, START)
    rec.look()
    rec.write(CTRL_CANCEL, 1)
    rec.finish()
    rec.look(buffer=BUFFER_SIZE)
    rec.write(CTRL_CANCEL, 0)
    rec.write(CTRL_REQ, GO_IDLE)
    rec.run(GET_RANDOM_16)


def tpm_killed(rec: DaemonRecorder) -> None:
    """The TPM's process is killed between two commands: tpmSts, which goIdle and cmdReady leave set; START again."""
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.run(STARTUP)
    rec.kill_tpm()
    for _ in range(3):
        rec.write(CTRL_REQ, CMD_READY)
        rec.write_bytes(BUFFER, GET_RANDOM_16)
        rec.write(CTRL_START, START)
        rec.await_failure()
        rec.look(buffer=64)
        rec.write(CTRL_REQ, GO_IDLE)
        rec.look()


def chunked_command_to_tpm(rec: DaemonRecorder) -> None:
    """A TPM2_GetRandom followed by so many bytes that the command has 4096, in two pieces: TPM_RC_SIZE.

    No command of libtpms is longer than the data buffer by what it must carry.
    """
    rec.write(LOC_CTRL, REQUEST_ACCESS)
    rec.run(STARTUP)
    command = tpm_bytes(4096, code=0x17B)
    rec.write(CTRL_REQ, CMD_READY)
    rec.write_bytes(BUFFER, command[:BUFFER_SIZE])
    rec.write(CTRL_START, NEXT_CHUNK)
    rec.look(buffer=16)
    rec.write_bytes(BUFFER, command[BUFFER_SIZE:])
    rec.write(CTRL_START, START)
    rec.finish()
    rec.look(buffer=BUFFER_SIZE)
    rec.write(CTRL_REQ, GO_IDLE)
