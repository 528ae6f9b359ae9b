"""How one daemon is to behave."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from crbd.server.endpoint import Endpoint
from crbd.service.options import InstanceOptions


@dataclass(frozen=True, slots=True)
class DaemonOptions:
    """Where the daemon is reached, and how long it lives. At least one of the three endpoints is given; `registers`
    exactly where the instance's options serve registers."""

    ctrl: Endpoint | None
    data: Endpoint | None
    instance: InstanceOptions
    registers: Endpoint | None = None
    """Where register clients connect: vfio-user."""
    allowed_users: frozenset[int] | None = None
    """Whose clients are accepted on UNIX sockets; None for all that can reach them."""
    pid_file: Path | int | None = None
    """A path, or the descriptor of an open file."""
    disconnect: bool = False
    """Close each data connection after its first answer."""
    end_with_data_client: bool = False
    """End when a data client is gone, whichever way it had come (swtpm's `--terminate`)."""
    end_with_ctrl_client: bool = False
    """End when the control client is gone (swtpm's `--ctrl …,terminate`)."""
    upgrade_at_hangup: bool = True
    """Whether SIGHUP asks for an upgrade; if not it ends the daemon, like SIGTERM."""
    supervised: bool = False
    """Tell the service manager, where there is one, how the daemon is."""
    fd_store: bool = False
    """At SIGTERM leave the clients to the service manager."""

    @property
    def endpoints(self) -> dict[str, Endpoint]:
        """Those that are given, by channel."""
        channels = (("ctrl", self.ctrl), ("data", self.data), ("registers", self.registers))
        return {name: endpoint for name, endpoint in channels if endpoint is not None}
