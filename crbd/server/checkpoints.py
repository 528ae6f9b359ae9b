"""Checkpoints of a TPM that has come to rest."""

from __future__ import annotations

import trio

from crbd.service.instance import Instance


async def keep_checkpoints(instance: Instance) -> None:
    """See every so often whether the TPM is idle, as its options say; for ever, or not at all."""
    pause = instance.options.checkpoint.when_idle
    while pause is not None:
        await trio.sleep(pause)
        await trio.to_thread.run_sync(instance.checkpoint_when_idle)
