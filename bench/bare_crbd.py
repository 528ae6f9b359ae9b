"""crbd without its registers: what the round trip would cost if commands did not go through the CRB device.

The same command line as crbd's. Only to be compared with: `crbd registers` shows nothing here.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import crbd.service.registers
from crbd.cli.main import main
from crbd.crb.device import CrbDevice
from crbd.crb.effects import Busy, Execute


class NoDevice(CrbDevice):
    """Takes every command and shows none."""

    __slots__ = ()

    def submit(self, locality: int, command: bytes) -> Execute | Busy:
        return Execute(command, locality)

    def complete(self, response: bytes) -> None:
        return None


if __name__ == "__main__":
    vars(crbd.service.registers)["CrbDevice"] = NoDevice
    sys.exit(main())
