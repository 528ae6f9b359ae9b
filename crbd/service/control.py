"""What each control request does to the instance, and what is answered.

Sequencing rules that hold for many commands (needs a running TPM, needs a stopped one) come from the table in
`crbd.control.spec`; here stands only what is particular to each. SET_DATAFD and the end of the process after SHUTDOWN
belong to the server, which owns the sockets.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from crbd.control import messages as m
from crbd.control.spec import BY_REQUEST, CAPABILITIES, MAX_INFO, MAX_OUTCOME, Needs
from crbd.errors import EngineError, StateDamagedError, StateError, StateNewerError, StateSealedError, StoreError
from crbd.service.instance import Instance
from crbd.state.kinds import StateKind
from crbd.tpm.results import TpmResult

log = logging.getLogger(__name__)


class ControlService:
    """Answers control requests for one instance. Blocks for as long as the TPM needs; call it from a worker thread.

    Requests whose spec says `while_executing` never wait for a command that computes.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance

    def answer(self, request: m.Request) -> m.Reply:
        """Carry the request out. Every failure becomes a reply; nothing is raised."""
        needs = BY_REQUEST[type(request)].needs
        running = self._instance.running
        if (needs is Needs.RUNNING and not running) or (needs is Needs.STOPPED and running):
            return m.refuse(type(request), TpmResult.BAD_ORDINAL)
        try:
            return _ANSWERS[type(request)](self._instance, request)
        except EngineError as error:
            log.warning("control command %s: %s", type(request).__name__, error)
            return m.refuse(type(request), error.result)
        except StateError as error:
            log.error("control command %s: %s", type(request).__name__, error)
            return m.refuse(type(request), _result_of(error))
        except StoreError as error:
            log.error("control command %s: %s", type(request).__name__, error)
            return m.refuse(type(request), TpmResult.FAIL)


def _result_of(error: StateError) -> TpmResult:
    if isinstance(error, StateSealedError):
        return TpmResult.KEY_NOT_FOUND
    if isinstance(error, StateNewerError):
        return TpmResult.BAD_VERSION
    if isinstance(error, StateDamagedError):
        return TpmResult.BAD_PARAMETER
    return TpmResult.FAIL


def _get_capability(_: Instance, __: m.GetCapability) -> m.Reply:
    return m.Capabilities(CAPABILITIES)


def _init(instance: Instance, request: m.Init) -> m.Reply:
    instance.init(delete_volatile=bool(request.flags & m.InitFlag.DELETE_VOLATILE))
    return m.Done()


def _stop(instance: Instance, _: m.Stop | m.Shutdown) -> m.Reply:
    instance.stop()
    return m.Done()


def _get_tpmestablished(instance: Instance, _: m.GetTpmEstablished) -> m.Reply:
    return m.Established(instance.established())


def _set_locality(instance: Instance, request: m.SetLocality) -> m.Reply:
    instance.set_locality(request.locality)
    return m.Done()


def _hash_start(instance: Instance, _: m.HashStart) -> m.Reply:
    instance.hash_start()
    return m.Done()


def _hash_data(instance: Instance, request: m.HashData) -> m.Reply:
    instance.hash_data(request.data)
    return m.Done()


def _hash_end(instance: Instance, _: m.HashEnd) -> m.Reply:
    instance.hash_end()
    return m.Done()


def _cancel(instance: Instance, _: m.CancelTpmCmd) -> m.Reply:
    instance.cancel()
    return m.Done()


def _store_volatile(instance: Instance, _: m.StoreVolatile) -> m.Reply:
    instance.store_volatile()
    return m.Done()


def _reset_tpmestablished(instance: Instance, request: m.ResetTpmEstablished) -> m.Reply:
    instance.reset_established(request.locality)
    return m.Done()


def _kind(blob_type: int, refusal: TpmResult) -> StateKind:
    try:
        return StateKind(blob_type)
    except ValueError:
        raise EngineError(f"state blob of type {blob_type}", refusal) from None


def _get_stateblob(instance: Instance, request: m.GetStateBlob) -> m.Reply:
    kind = _kind(request.blob_type, TpmResult.FAIL)
    decrypted = bool(request.flags & m.StateFlag.DECRYPTED)
    piece = instance.state_blob(kind, decrypted=decrypted, offset=request.offset)
    if piece is None:
        return m.refuse(m.GetStateBlob, TpmResult.RETRY)
    flags = m.StateFlag.ENCRYPTED if instance.options.file_key is not None and not decrypted else m.StateFlag(0)
    # swtpm says what remains, not what the whole is; QEMU insists on both lengths being the same.
    return m.StateBlob(result=TpmResult.SUCCESS, flags=flags, total_length=len(piece), data=piece)


def _set_stateblob(instance: Instance, request: m.SetStateBlob) -> m.Reply:
    kind = _kind(request.blob_type, TpmResult.BAD_PARAMETER)
    instance.set_state_blob(kind, request.data, encrypted=bool(request.flags & m.StateFlag.ENCRYPTED))
    return m.Done()


def _get_config(instance: Instance, _: m.GetConfig) -> m.Reply:
    flags = m.ConfigFlag(0)
    if instance.options.file_key is not None:
        flags |= m.ConfigFlag.FILE_KEY
    if instance.options.migration_key is not None:
        flags |= m.ConfigFlag.MIGRATION_KEY
    return m.Config(flags)


def _set_buffersize(instance: Instance, request: m.SetBufferSize) -> m.Reply:
    if request.wanted and instance.running:
        return m.Failure(TpmResult.BAD_ORDINAL)
    size = instance.buffer_size(request.wanted)
    return m.BufferSizes(size.current, size.minimum, size.maximum)


def _get_info(instance: Instance, request: m.GetInfo) -> m.Reply:
    text = instance.info(request.flags).encode() + b"\0"
    if request.offset >= len(text) - 1:
        return m.Failure(TpmResult.BAD_PARAMETER)
    return m.Info(len(text), text[request.offset : request.offset + MAX_INFO])


def _lock_storage(instance: Instance, request: m.LockStorage) -> m.Reply:
    instance.lock_storage(request.retries)
    return m.Done()


def _get_registers(instance: Instance, _: m.GetRegisters) -> m.Reply:
    return m.Registers(instance.localities, instance.register_pages())


def _take_snapshot(instance: Instance, _: m.TakeSnapshot) -> m.Reply:
    try:
        return m.Snapshot(True, instance.snapshot())
    except (EngineError, StateError, StoreError) as error:
        return m.Snapshot(False, str(error).encode()[:MAX_OUTCOME])


def _restore(instance: Instance, request: m.Restore) -> m.Reply:
    allowed = bool(request.flags & m.RestoreFlag.ALLOW_ROLLBACK)
    try:
        said = instance.restore(request.document, allow_rollback=allowed)
    except (EngineError, StateError, StoreError) as error:
        log.error("RESTORE was refused, and the TPM is as it was: %s", error)
        return m.Outcome(False, str(error).encode()[:MAX_OUTCOME])
    log.warning("RESTORE: %s", said)
    return m.Outcome(True, said.encode()[:MAX_OUTCOME])


# The handlers take their own request type; the table's key says which, which no type of a dict can.
_ANSWERS: dict[type[m.Request], Callable[[Instance, Any], m.Reply]] = {
    m.GetCapability: _get_capability,
    m.Init: _init,
    m.Shutdown: _stop,
    m.GetTpmEstablished: _get_tpmestablished,
    m.SetLocality: _set_locality,
    m.HashStart: _hash_start,
    m.HashData: _hash_data,
    m.HashEnd: _hash_end,
    m.CancelTpmCmd: _cancel,
    m.StoreVolatile: _store_volatile,
    m.ResetTpmEstablished: _reset_tpmestablished,
    m.GetStateBlob: _get_stateblob,
    m.SetStateBlob: _set_stateblob,
    m.Stop: _stop,
    m.GetConfig: _get_config,
    m.SetBufferSize: _set_buffersize,
    m.GetInfo: _get_info,
    m.LockStorage: _lock_storage,
    m.GetRegisters: _get_registers,
    m.TakeSnapshot: _take_snapshot,
    m.Restore: _restore,
}
