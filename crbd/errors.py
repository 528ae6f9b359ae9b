"""The whole exception family: whose fault it is, what is answered, what the operator can do.

Three kinds of people make mistakes, and each kind is told in its own way:

- A *guest* is answered with a TPM response code or a register value. No exception of this module stands for a
  guest's mistake.
- A *peer* on a socket that breaks the protocol loses that connection and nothing else: `ProtocolError`.
- An *operator* who gave a wrong option or a file that cannot be used gets one line that names the thing and the
  remedy, and an exit code of its own: `OperatorError` and its children.

`EngineError` and `StoreError` stand between them: the service turns each into an answer on the wire while the TPM runs,
or into an `OperatorError` at start-up.
"""

from __future__ import annotations

from typing import ClassVar


class CrbdError(Exception):
    """Base of every exception that crbd raises on purpose."""


class ProtocolError(CrbdError):
    """A peer sent bytes that its protocol does not allow. Ends that connection alone."""


class WireError(ProtocolError):
    """A structure is shorter or longer than its layout says, or larger than its cap allows."""


class EngineError(CrbdError):
    """A call into the TPM engine failed.

    `result` is the library's TPM_RESULT (libtpms' tpm_error.h), ready to be sent on the control channel.
    """

    def __init__(self, call: str, result: int) -> None:
        super().__init__(f"{call} failed with TPM_RESULT 0x{result:x}")
        self.call = call
        self.result = result


class StoreError(CrbdError):
    """A write of TPM state did not become durable (no space, I/O error, directory gone).

    What was to be written is still wanted: the caller keeps it and tries again with the next write.
    """


class StoreFencedError(StoreError):
    """The state moved on under this process: another writer committed, or the file was replaced or removed.

    Nothing was written. Trying again is of no use: this process's TPM is no longer the one on disk, and it must end.
    """


class OperatorError(CrbdError):
    """Ends the start (or the command): `what` is wrong, and `remedy` says what to do about it.

    The text is one line. `exit_code` is the process's exit status; docs/exit-codes.md lists them all.
    """

    exit_code: ClassVar[int] = 1
    meaning: ClassVar[str] = "an error that has no code of its own"

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what}: {remedy}" if remedy else what)
        self.what = what
        self.remedy = remedy


class UsageError(OperatorError):
    """An option is unknown, malformed or contradicts another."""

    exit_code = 2
    meaning = "a command line option is unknown, malformed or contradicts another"


class StateError(OperatorError):
    """TPM state exists but cannot be used. Nothing was changed."""

    exit_code = 10
    meaning = "the TPM state cannot be used, for a reason that has no code of its own"


class StateAbsentError(StateError):
    """There is no TPM state where the caller required it or did not allow a new one."""

    exit_code = 11
    meaning = "there is no TPM state, and a new TPM was not allowed"


class StateDamagedError(StateError):
    """The state is cut short, malformed, or the engine rejects it."""

    exit_code = 12
    meaning = "the TPM state is damaged: cut short, malformed or rejected by the engine"


class StateNewerError(StateError):
    """The state was written by a newer release in a form this one does not read."""

    exit_code = 13
    meaning = "the TPM state needs a newer release"


class StateSealedError(StateError):
    """The state is encrypted and no key was given (`StateWrongKeyError`: not the right one)."""

    exit_code = 14
    meaning = "the TPM state is encrypted and no key was given"


class StateLockedError(StateError):
    """Another process holds the state."""

    exit_code = 15
    meaning = "another process uses the TPM state"


class StateAccessError(StateError):
    """The operating system refuses access to the state's directory or files."""

    exit_code = 16
    meaning = "the operating system refuses access to the TPM state"


class StateEmptyError(StateError):
    """The file is there and holds nothing: no crbd leaves it so."""

    exit_code = 17
    meaning = "the file that should hold the TPM state is empty"


class StateUnfinishedError(StateError):
    """The making of a new state was interrupted before its first commit. No TPM was lost."""

    exit_code = 18
    meaning = "the making of a new TPM was interrupted before anything was stored"


class StateForeignError(StateError):
    """The file holds something else: another program's data, or another layout of TPM state."""

    exit_code = 19
    meaning = "the file holds something other than TPM state in the layout that was expected"


class StateIdentityError(StateError):
    """The state belongs to another instance than the one it was opened for."""

    exit_code = 41
    meaning = "the TPM state belongs to another instance (its UUID is another)"


class StateWrongKeyError(StateSealedError):
    """None of the keys that were given opens the state."""

    exit_code = 40
    meaning = "the TPM state is encrypted and none of the given keys opens it"


class StateDowngradeError(StateError):
    """The state cannot be written in the older form that was asked for without losing something."""

    exit_code = 42
    meaning = "the TPM state cannot be written in the older format: something would be lost"


class StateUnsealedError(StateError):
    """A key was given, and the state is not encrypted: it may have been put there by someone without the key."""

    exit_code = 43
    meaning = "a key was given and the TPM state is not encrypted"


class StateExposedError(StateError):
    """Others than the user that runs crbd, and root, may change the state, or put another in its place."""

    exit_code = 45
    meaning = "the TPM state lies where other users may change it"


class StateWriteError(StateError):
    """The state could not be written: no space, an I/O error, another writer. What was there is as it was."""

    exit_code = 44
    meaning = "the TPM state could not be written; what was there is as it was"

    @classmethod
    def of(cls, error: StoreError) -> StateWriteError:
        """The same for an operator who waits for the command, where a running TPM would try again."""
        if isinstance(error, StoreFencedError):
            return cls(str(error), "let one program at a time use it")
        return cls(str(error), "make room, or see to the disk, and try again")


class EngineMissingError(OperatorError):
    """libtpms is missing or too old."""

    exit_code = 20
    meaning = "libtpms is missing or too old"


class EngineFailedError(OperatorError):
    """libtpms is there but would not start."""

    exit_code = 21
    meaning = "libtpms would not start the TPM"


class EndpointError(OperatorError):
    """A socket cannot be opened: address in use, no such directory, bad descriptor, no permission."""

    exit_code = 30
    meaning = "a socket cannot be opened or a handed-over descriptor cannot be used"


class PidFileError(OperatorError):
    """The pid file cannot be written."""

    exit_code = 31
    meaning = "the pid file cannot be written"


class DaemonError(OperatorError):
    """A running daemon could not be asked."""

    exit_code = 32
    meaning = "a running daemon could not be asked, or does not know what it was asked"


class NotUpgradedError(OperatorError):
    """A running daemon was not upgraded; it goes on as before."""

    exit_code = 34
    meaning = "a running daemon was not upgraded, and goes on as before"


class SnapshotRefusedError(OperatorError):
    """A running daemon did not give, or did not take, a snapshot."""

    exit_code = 35
    meaning = "a running daemon did not give, or did not take, a snapshot; its TPM is as it was"


class HandoverError(OperatorError):
    """What the daemon before this one handed over cannot be gone on with."""

    exit_code = 33
    meaning = "what a running daemon handed over for its upgrade cannot be gone on with"


class WallError(OperatorError):
    """The daemon cannot be walled in as it was asked to be."""

    exit_code = 38
    meaning = "the daemon cannot be walled in as it was asked to be: seccomp, Landlock"


class AuthorityError(OperatorError):
    """The certificate authority cannot be used, or did not issue what it was asked for."""

    exit_code = 50
    meaning = "the certificate authority cannot be used, or did not issue a certificate"


class AuthorityAbsentError(AuthorityError):
    """There is no certificate authority, and making one was not asked for."""

    exit_code = 51
    meaning = "there is no certificate authority"


class ProvisionError(OperatorError):
    """A TPM could not be provisioned. The state is as it was before."""

    exit_code = 52
    meaning = "the TPM could not be provisioned; its state was not changed"


class TssMissingError(OperatorError):
    """tpm2-pytss, which provisioning is built on, is missing."""

    exit_code = 53
    meaning = "tpm2-pytss is missing, which provisioning needs"
