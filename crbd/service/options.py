"""How one TPM is to behave: what swtpm's `--flags`, `--locality`, `--migration` and `--migration-key` set."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from crbd.state.swtpm_sealing import SwtpmKey
from crbd.tpm.codes import StartupType


class Startup(Enum):
    """What happens to the TPM when the daemon starts."""

    NEED_INIT = "need-init"
    """Nothing: the client sends INIT. What QEMU does."""
    POWER_ON = "power-on"
    """Powered on; the client sends TPM2_Startup. swtpm's not-need-init."""
    CLEAR = "clear"
    """Powered on and started with TPM2_Startup(CLEAR)."""
    STATE = "state"
    """Powered on and started with TPM2_Startup(STATE)."""

    @property
    def startup_type(self) -> StartupType | None:
        """The TPM2_Startup to send, if any."""
        return {Startup.CLEAR: StartupType.CLEAR, Startup.STATE: StartupType.STATE}.get(self)


@dataclass(frozen=True, slots=True)
class CheckpointPolicy:
    """When volatile state is stored without anybody's asking: never, unless one of the two is set."""

    every_command: bool = False
    """With every command that may have changed it, before the answer leaves."""
    when_idle: float | None = None
    """When the TPM has been left as it is for so many seconds, up to twice as many."""


@dataclass(frozen=True, slots=True)
class InstanceOptions:
    """The behaviour of one instance."""

    startup: Startup = Startup.NEED_INIT
    may_manufacture: bool = False
    """Whether a TPM may be made where no state is."""
    auto_shutdown: bool = True
    """Whether TPM2_Shutdown is sent for a client that takes the power away without it."""
    serves_registers: bool = False
    """Whether there is a register file for a register client (crbd.service.served)."""
    reject_locality_4: bool = False
    """Refuse locality 4 from SET_LOCALITY and the vendor command."""
    allow_set_locality: bool = False
    """Honour the vendor command that sets the locality on the data channel."""
    migration_key: SwtpmKey | None = field(default=None, repr=False)
    """Encrypts the state blobs that GET_STATEBLOB hands out; opens those of SET_STATEBLOB."""
    file_key: SwtpmKey | None = field(default=None, repr=False)
    """The key of state in swtpm's layout. Encrypts state blobs for a client that does not ask for decrypted ones."""
    incoming: bool = False
    """The store is neither locked nor looked at before the first SET_STATEBLOB, INIT or LOCK_STORAGE: until then the
    TPM may run elsewhere on the same storage."""
    release_lock_outgoing: bool = False
    """The store's lock is given up when the savestate blob was asked for: the TPM may then be started elsewhere on the
    same storage. The next command takes it back, if nobody has started it."""
    lock_retries: int = 300
    """How often, 10 ms apart, a lock that another process holds is tried again where no client says how often (swtpm's
    figure)."""
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    """For a store whose `keeps_checkpoints` is true."""
