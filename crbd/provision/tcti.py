"""tpm2-tss on our own engine: a TCTI whose TPM is in this process.

tpm2-pytss is imported here first, so that its absence is one clear error, and tpm2-tss is told to log nothing: what it
would print to stderr comes back as an exception too.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from crbd.errors import TssMissingError

os.environ.setdefault("TSS2_LOG", "all+none")

try:
    from tpm2_pytss import PyTCTI
except ImportError as missing:
    raise TssMissingError(
        f"provisioning needs tpm2-pytss, which cannot be imported ({missing})", "pip install 'crbd[tss]'"
    ) from missing


class EngineTcti(PyTCTI):
    """A TCTI (TSS 2.0 TPM Command Transmission Interface) over a function that runs one TPM command.

    What the function raises does not come through tpm2-tss, which has an error code of its own for it: it is in
    `raised`.
    """

    def __init__(self, execute: Callable[[bytes], bytes]) -> None:
        self._execute = execute
        self._response: bytes | None = None
        self.raised: Exception | None = None
        """What ended the last command instead of an answer."""
        super().__init__(magic=b"CRBD")

    def do_transmit(self, command: bytes) -> None:
        """Run the command; the answer waits."""
        self.raised = None
        try:
            self._response = self._execute(command)
        except Exception as error:
            self.raised = error
            raise

    def do_receive(self, timeout: int) -> bytes:
        """The answer. It is there whatever the timeout (milliseconds)."""
        if self._response is None:
            raise RuntimeError("tpm2-tss asks for an answer to a command that it did not send")
        response, self._response = self._response, None
        return response
