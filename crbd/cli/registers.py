"""`crbd registers`: the live CRB registers of a running TPM, decoded field by field."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from crbd.cli.control_client import ask, unknown_to
from crbd.control.messages import GetRegisters, Registers
from crbd.crb.config import BUFFER_OFFSET, PAGE_SIZE
from crbd.crb.spec import decode
from crbd.errors import UsageError
from crbd.server.endpoint import parse_endpoint

DESCRIPTION = """Show the CRB registers of a running TPM as they are now. The guest is not disturbed, and it does not
matter who has the control
channel."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `crbd registers`."""
    parser.add_argument(
        "--ctrl", metavar="ENDPOINT", required=True, help="the daemon's control socket: unix:PATH or tcp:HOST:PORT"
    )
    parser.add_argument("--locality", type=int, metavar="N", help="only this locality's page (default: all)")
    parser.add_argument("--buffer", action="store_true", help="also the data buffer, which may hold secrets, in hex")
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Ask, print, return 0. Raises OperatorError."""
    endpoint = parse_endpoint(arguments.ctrl, "--ctrl")
    reply = ask(endpoint, GetRegisters())
    if not isinstance(reply, Registers) or len(reply.pages) != reply.localities * PAGE_SIZE:
        raise unknown_to(endpoint, "GET_REGISTERS", reply)
    wanted = range(reply.localities)
    if arguments.locality is not None:
        if arguments.locality not in wanted:
            raise UsageError(
                f"there is no locality {arguments.locality}", f"localities go from 0 to {reply.localities - 1}"
            )
        wanted = range(arguments.locality, arguments.locality + 1)
    pages = {number: reply.pages[number * PAGE_SIZE :][:PAGE_SIZE] for number in wanted}
    show = _as_json if arguments.json else _as_text
    sys.stdout.write(show(pages, with_buffer=arguments.buffer))
    return 0


def _as_json(pages: dict[int, bytes], *, with_buffer: bool) -> str:
    shown: list[dict[str, Any]] = []
    for number, page in pages.items():
        registers = {
            register.name: {
                "offset": register.offset,
                "size": register.size,
                "value": register.value,
                "fields": dict(register.fields),
            }
            for register in decode(page)
        }
        shown.append({"locality": number, "registers": registers})
        if with_buffer:
            shown[-1]["buffer"] = page[BUFFER_OFFSET:].hex()
    return json.dumps({"localities": shown}, indent=2) + "\n"


def _as_text(pages: dict[int, bytes], *, with_buffer: bool) -> str:
    lines: list[str] = []
    for number, page in pages.items():
        lines.append(f"locality {number}")
        for register in decode(page):
            fields = " ".join(
                f"{name}={value:#x}" if value > 9 else f"{name}={value}" for name, value in register.fields
            )
            digits = 2 * register.size
            lines.append(
                f"  {register.offset:#04x} {register.name:<12} {register.value:#0{digits + 2}x}  {fields}".rstrip()
            )
        if with_buffer:
            lines.append("  0x80 data buffer")
            lines += [f"    {page[at : at + 32].hex(' ', 4)}" for at in range(BUFFER_OFFSET, PAGE_SIZE, 32)]
    return "\n".join(lines) + "\n"
