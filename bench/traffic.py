"""What a day of clients does to a daemon, drawn from a seed: commands, control requests, nonsense, broken connections.

Theory. There is one data and one control connection at a time. A step is one action on one of them, drawn by weight.
After every step both connections are in order again: what was asked is answered, or the connection was dropped and will
be opened anew when it is needed next. So every answer can be checked: its form always, its result where only one is
right. What no client saw acknowledged may have happened or not: of the NV index all contents that are possible are
remembered.
"""

from __future__ import annotations

import array
import random
import socket
import struct
from collections import Counter
from collections.abc import Callable

import commands
import control
from daemons import SWTPM, Daemon

NV_INDEX = 0x01800200
NV_SIZE = 64
ANSWER_DEADLINE = 60.0
"""Seconds for one answer; after that the daemon counts as hanging."""
BUFFER_SIZE = 4096
RESPONSE_TAGS = (0x8001, 0x8002, 0x00C4)
"""TPM_ST_NO_SESSIONS, TPM_ST_SESSIONS, and TPM_ST_RSP_COMMAND: the answer to a tag that there is not."""


class WrongAnswerError(Exception):
    """The daemon's answer is malformed, or not the one that is right. The text says which and to what."""


def check_form(response: bytes) -> int:
    """Check the head of a whole response (Part 3, section 4.4); returns the response code. Raises WrongAnswerError."""
    if len(response) < commands.HEAD.size:
        raise WrongAnswerError(f"a response of {len(response)} bytes: {response.hex()}")
    tag, size, code = commands.HEAD.unpack_from(response)
    if tag not in RESPONSE_TAGS or size != len(response):
        raise WrongAnswerError(f"a malformed response of {len(response)} bytes: {response[:16].hex()}")
    if code != commands.RC_SUCCESS and size != commands.HEAD.size:
        raise WrongAnswerError(f"an error response of {size} bytes: {response[:16].hex()}")
    return int(code)


class Traffic:
    """Random clients of one daemon. `counts` is how often each action took place, `codes` each response code."""

    def __init__(self, daemon: Daemon, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.action = "open"
        """The action that takes place now."""
        self.codes: Counter[int] = Counter()
        self.exchanges = 0
        """TPM commands and control requests that were answered."""
        self._daemon = daemon
        self._chance = random.Random(seed)
        self._data: socket.socket | None = None
        self._control: socket.socket | None = None
        self._nv_contents: set[bytes] = set()
        weighted = [*_DATA_ACTIONS, *_CONTROL_ACTIONS, *_ODD_ACTIONS]
        if daemon.subject == SWTPM:
            # swtpm takes a read for a command, and a data connection it was handed for another: see README.md.
            weighted = [entry for entry in weighted if entry[1] not in _BEYOND_SWTPM]
        self._actions = [action for _, action in weighted]
        self._weights = [weight for weight, _ in weighted]

    def open(self) -> None:
        """Connect, and define the NV index where it is not there yet."""
        self._run(commands.nv_define(NV_INDEX, NV_SIZE), accept=None)
        self._write_nv(self._chance.randbytes(NV_SIZE))

    def step(self) -> None:
        """One random action. Raises WrongAnswerError, and OSError where a connection broke that should not have."""
        action = self._chance.choices(self._actions, self._weights)[0]
        self.action = action.__name__.strip("_")
        self.counts[self.action] += 1
        action(self)

    def settle(self) -> None:
        """Make sure that both connections are open and answered, so that the daemon holds what it holds in between."""
        self._run(commands.read_clock())
        self._ask(control.GET_CAPABILITY)

    def check_nv(self) -> None:
        """The NV index holds what was acknowledged last, or what was sent after that and not acknowledged.

        Raises WrongAnswerError.
        """
        response = self._run(commands.nv_read(NV_INDEX, NV_SIZE))
        content = response[16 : 16 + NV_SIZE]
        if content not in self._nv_contents:
            raise WrongAnswerError(f"the NV index holds {content.hex()}, which is not what was written last")
        self._nv_contents = {content}

    def follow(self, daemon: Daemon) -> None:
        """Go on with a daemon that was started in the place of the old one."""
        self.close()
        self._daemon = daemon

    def close(self) -> None:
        """Close both connections."""
        self._drop_data()
        self._drop_control()

    # -- connections

    def _data_connection(self) -> socket.socket:
        if self._data is None:
            self._data = self._daemon.connect_data()
            self._data.settimeout(ANSWER_DEADLINE)
        return self._data

    def _control_connection(self) -> socket.socket:
        if self._control is None:
            self._control = self._daemon.connect_control()
            self._control.settimeout(ANSWER_DEADLINE)
        return self._control

    def _drop_data(self) -> None:
        if self._data is not None:
            self._data.close()
            self._data = None

    def _drop_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    # -- exchanges

    def _response(self, connection: socket.socket) -> bytes:
        head = control.read_exactly(connection, commands.HEAD.size)
        size = int.from_bytes(head[2:6], "big")
        if not commands.HEAD.size <= size <= BUFFER_SIZE:
            raise WrongAnswerError(f"a response whose size is {size}: {head.hex()}")
        response = head + control.read_exactly(connection, size - len(head))
        self.codes[check_form(response)] += 1
        self.exchanges += 1
        return response

    def _run(self, command: bytes, accept: tuple[int, ...] | None = (commands.RC_SUCCESS,)) -> bytes:
        """One command and its response, whose code must be one of `accept` (None: any)."""
        connection = self._data_connection()
        connection.sendall(command)
        response = self._response(connection)
        if accept is not None and commands.response_code(response) not in accept:
            raise WrongAnswerError(f"{response.hex()} in answer to {command[:40].hex()}")
        return response

    def _ask(self, request: int, body: bytes = b"") -> bytes:
        """One control request whose result must be a success; returns what follows the result in the reply."""
        result, data = control.ask(self._control_connection(), request, body)
        self.exchanges += 1
        if result != control.SUCCESS:
            raise WrongAnswerError(f"result {result:#x} in answer to control request {request:#x} {body[:16].hex()}")
        return data

    def _write_nv(self, content: bytes) -> None:
        self._nv_contents.add(content)
        self._run(commands.nv_write(NV_INDEX, content))
        self._nv_contents = {content}

    def _some_command(self) -> bytes:
        """A command that needs nothing, leaves nothing behind and succeeds."""
        chance = self._chance
        kinds: tuple[Callable[[], bytes], ...] = (
            lambda: commands.get_random(chance.randint(1, 32)),
            lambda: commands.pcr_read(chance.randrange(24)),
            lambda: commands.pcr_extend(10, chance.randbytes(32)),
            lambda: commands.hash_sha256(chance.randbytes(chance.randint(0, 1024))),
            commands.get_capability,
            commands.read_clock,
        )
        return chance.choice(kinds)()

    # -- actions: data

    def _command(self) -> None:
        self._run(self._some_command())

    def _nv_write(self) -> None:
        self._write_nv(self._chance.randbytes(NV_SIZE))

    def _nv_read(self) -> None:
        self.check_nv()

    def _make_key_and_sign(self) -> None:
        key = commands.first_handle(self._run(commands.create_primary_ecc()))
        self._run(commands.sign(key, commands.ALG_ECDSA, self._chance.randbytes(32)))
        self._run(commands.flush_context(key))

    def _session(self) -> None:
        session = commands.first_handle(self._run(commands.start_hmac_session(self._chance.randbytes(16))))
        self._run(commands.flush_context(session))

    def _failing_command(self) -> None:
        """Whole, and wrong inside: cut short with its size put right, an unknown code, an unknown tag, random bytes."""
        chance, command = self._chance, bytearray(self._some_command())
        kind = chance.randrange(4)
        if kind == 0:
            del command[chance.randint(commands.HEAD.size, len(command)) :]
        elif kind == 1:
            command[6:10] = struct.pack(">I", chance.choice((0, 0x11E, 0x1FF, 0x20000000, 0xFFFFFFFF)))
        elif kind == 2:
            command[0:2] = struct.pack(">H", chance.choice((0, 0xC1, 0x8000, 0x8003, 0xFFFF)))
        else:
            command[commands.HEAD.size :] = chance.randbytes(chance.randint(0, 200))
        command[2:6] = struct.pack(">I", len(command))
        self._run(bytes(command), accept=None)

    def _command_in_pieces(self) -> None:
        command = self._some_command()
        connection = self._data_connection()
        for piece in _pieces(self._chance, command):
            connection.sendall(piece)
            if self._chance.random() < 0.5:
                self._ask(control.GET_CAPABILITY)  # the daemon has most likely read the piece when it answers
        self._response(connection)

    def _two_commands_at_once(self) -> None:
        connection = self._data_connection()
        connection.sendall(self._some_command() + self._some_command())
        for _ in range(2):
            self._response(connection)

    def _wrong_size(self) -> None:
        """A size that no command can have: answered with an error, or the end of the connection."""
        size = self._chance.choice((0, 1, 9, BUFFER_SIZE + 1, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFF))
        connection = self._data_connection()
        connection.sendall(commands.HEAD.pack(commands.ST_NO_SESSIONS, size, 0x17B) + b"\0\x10")
        try:
            self._response(connection)
        except ConnectionError:
            self.exchanges += 1
        self._drop_data()

    # -- actions: data connections that break

    def _reconnect_data(self) -> None:
        self._drop_data()
        self._data_connection()

    def _hang_up_in_command(self) -> None:
        command = self._some_command()
        self._data_connection().sendall(command[: self._chance.randrange(1, len(command))])
        self._drop_data()

    def _hang_up_before_response(self) -> None:
        self._data_connection().sendall(self._some_command())
        self._drop_data()

    def _hang_up_before_nv_response(self) -> None:
        content = self._chance.randbytes(NV_SIZE)
        self._nv_contents.add(content)
        self._data_connection().sendall(commands.nv_write(NV_INDEX, content))
        self._drop_data()

    def _hang_up_in_response(self) -> None:
        connection = self._data_connection()
        connection.sendall(self._some_command())
        control.read_exactly(connection, self._chance.randrange(1, commands.HEAD.size))
        self._drop_data()

    def _half_close(self) -> None:
        connection = self._data_connection()
        connection.sendall(self._some_command())
        connection.shutdown(socket.SHUT_WR)
        self._response(connection)
        if connection.recv(1):
            raise WrongAnswerError("more than one response to the last command before the client's end closed")
        self._drop_data()

    def _knock_at_data(self) -> None:
        """Another client comes and goes while one is served, who then goes, too."""
        self._run(commands.read_clock())
        self._daemon.connect_data().close()
        self._drop_data()

    # -- actions: control

    def _control_query(self) -> None:
        queries = (control.GET_CAPABILITY, control.GET_TPMESTABLISHED, control.GET_CONFIG, control.CANCEL_TPM_CMD)
        self._ask(self._chance.choice(queries))

    def _buffer_size(self) -> None:
        size, smallest, largest = struct.unpack(">III", self._ask(control.SET_BUFFERSIZE, bytes(4)))
        if not smallest <= size <= largest:
            raise WrongAnswerError(f"buffer size {size}, not in {smallest} to {largest}")

    def _info(self) -> None:
        self._ask(control.GET_INFO, struct.pack(">QII", 1, 0, 0))

    def _locality(self) -> None:
        self._ask(control.SET_LOCALITY, bytes((self._chance.randrange(4),)))
        self._run(self._some_command())
        self._ask(control.SET_LOCALITY, b"\0")

    def _state_blob(self) -> None:
        kind = self._chance.choice((1, 2))
        data = self._ask(control.GET_STATEBLOB, struct.pack(">III", 1, kind, 0))
        total, size = struct.unpack_from(">II", data, 4)
        if total != size:
            raise WrongAnswerError(f"state blob {kind} came with {size} of {total} bytes")

    def _store_volatile(self) -> None:
        self._ask(control.STORE_VOLATILE)

    def _hash_sequence(self) -> None:
        self._ask(control.HASH_START)
        data = self._chance.randbytes(self._chance.randint(1, 9000))
        self._ask(control.HASH_DATA, struct.pack(">I", len(data)) + data)
        self._ask(control.HASH_END)

    def _reset(self) -> None:
        """What QEMU does when its guest resets."""
        self._ask(control.STOP)
        self._ask(control.INIT, bytes(4))
        self._run(commands.startup_clear(), accept=(commands.RC_SUCCESS, commands.RC_INITIALIZE))

    def _control_while_tpm_works(self) -> None:
        """A control request between a command and its response; it may be the one that cancels the command."""
        connection = self._data_connection()
        connection.sendall(commands.create_primary_ecc())
        self._ask(self._chance.choice((control.GET_CAPABILITY, control.CANCEL_TPM_CMD)))
        response = self._response(connection)
        if commands.response_code(response) == commands.RC_SUCCESS:
            self._run(commands.flush_context(commands.first_handle(response)))
        elif commands.response_code(response) != commands.RC_CANCELED:
            raise WrongAnswerError(f"{response.hex()} in answer to CreatePrimary")

    def _control_error(self) -> None:
        """Requests that must be refused: an unknown command, a locality and a kind of state that there is not."""
        requests = ((0x7F, b""), (control.SET_LOCALITY, b"\xff"), (control.GET_STATEBLOB, struct.pack(">III", 1, 9, 0)))
        request, body = self._chance.choice(requests)
        result, _ = control.ask(self._control_connection(), request, body)
        self.exchanges += 1
        if result == control.SUCCESS:
            raise WrongAnswerError(f"control request {request:#x} {body.hex()} succeeded")

    def _data_fd_when_there_is_one(self) -> None:
        """A descriptor that must be refused, and closed: a data connection is there already."""
        self._run(commands.read_clock())
        ours, theirs = socket.socketpair()
        with ours, theirs:
            passed = array.array("i", [theirs.fileno()])
            connection = self._control_connection()
            connection.sendmsg(
                [control.request(control.SET_DATAFD)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed.tobytes())]
            )
            result, _ = control.read_reply(connection, control.SET_DATAFD)
            theirs.close()
            ours.settimeout(ANSWER_DEADLINE)
            if result != control.IO_ERROR or ours.recv(1):
                raise WrongAnswerError(f"a second data connection was answered with {result:#x}")
        self.exchanges += 1

    # -- actions: control connections that break

    def _reconnect_control(self) -> None:
        self._drop_control()
        self._control_connection()

    def _hang_up_in_request(self) -> None:
        whole = control.request(control.GET_STATEBLOB, struct.pack(">III", 1, 1, 0))
        self._control_connection().sendall(whole[: self._chance.randrange(1, len(whole))])
        self._drop_control()

    def _hang_up_in_hash_data(self) -> None:
        self._control_connection().sendall(control.request(control.HASH_DATA, struct.pack(">I", 5000)) + bytes(1000))
        self._drop_control()

    def _hang_up_in_reply(self) -> None:
        connection = self._control_connection()
        connection.sendall(control.request(control.GET_STATEBLOB, struct.pack(">III", 1, 2, 0)))
        control.read_exactly(connection, self._chance.randrange(1, 17))
        self._drop_control()

    def _hang_up_before_reply(self) -> None:
        self._control_connection().sendall(control.request(control.GET_STATEBLOB, struct.pack(">III", 1, 2, 0)))
        self._drop_control()

    def _knock_at_control(self) -> None:
        """Another client comes and goes while one is served, who then goes, too."""
        self._ask(control.GET_CAPABILITY)
        self._daemon.connect_control().close()
        self._drop_control()


def _pieces(chance: random.Random, whole: bytes) -> list[bytes]:
    cuts = sorted(chance.sample(range(1, len(whole)), chance.randint(1, 3)))
    return [whole[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


_DATA_ACTIONS: tuple[tuple[int, Callable[[Traffic], None]], ...] = (
    (600, Traffic._command),
    (20, Traffic._nv_write),
    (30, Traffic._nv_read),
    (5, Traffic._make_key_and_sign),
    (30, Traffic._session),
    (40, Traffic._failing_command),
    (40, Traffic._command_in_pieces),
    (30, Traffic._two_commands_at_once),
    (5, Traffic._wrong_size),
)
_CONTROL_ACTIONS: tuple[tuple[int, Callable[[Traffic], None]], ...] = (
    (60, Traffic._control_query),
    (10, Traffic._buffer_size),
    (5, Traffic._info),
    (10, Traffic._locality),
    (10, Traffic._state_blob),
    (3, Traffic._store_volatile),
    (5, Traffic._hash_sequence),
    (2, Traffic._reset),
    (5, Traffic._control_while_tpm_works),
    (5, Traffic._control_error),
    (5, Traffic._data_fd_when_there_is_one),
)
_ODD_ACTIONS: tuple[tuple[int, Callable[[Traffic], None]], ...] = (
    (8, Traffic._reconnect_data),
    (5, Traffic._hang_up_in_command),
    (5, Traffic._hang_up_before_response),
    (2, Traffic._hang_up_before_nv_response),
    (5, Traffic._hang_up_in_response),
    (5, Traffic._half_close),
    (5, Traffic._knock_at_data),
    (5, Traffic._reconnect_control),
    (3, Traffic._hang_up_in_request),
    (1, Traffic._hang_up_in_hash_data),
    (3, Traffic._hang_up_in_reply),
    (3, Traffic._hang_up_before_reply),
    (5, Traffic._knock_at_control),
)
_BEYOND_SWTPM = (
    Traffic._command_in_pieces,
    Traffic._two_commands_at_once,
    Traffic._hang_up_in_command,
    Traffic._half_close,
    Traffic._data_fd_when_there_is_one,
)
