"""Provision a TPM in a store: all of it, or nothing.

Theory. Everything is done to a copy in memory (`StagedStore`), which one commit at the end makes the state. What ends a
run before, be it SIGKILL or a signer's refusal, leaves the store as it was: without a TPM, or with the one that was
there. So there is no half-made TPM, and nothing that a later run would have to recognise and clean up.
"""

from __future__ import annotations

from collections.abc import Callable

from crbd.engine.port import Engine, StatePort
from crbd.provision.options import ProvisionOptions
from crbd.provision.report import ProvisionReport
from crbd.provision.signing import CertificateSigner
from crbd.store.port import Store


def provision(
    store: Store,
    options: ProvisionOptions,
    signer: CertificateSigner | None,
    make_engine: Callable[[StatePort], Engine],
) -> ProvisionReport:
    """Make the TPM in `store`, which is locked and stays the caller's to close, what `options` say.

    `signer` may be None where no certificate is asked for. Raises OperatorError; the store is as before then.
    """
    raise NotImplementedError((store, options, signer, make_engine))
