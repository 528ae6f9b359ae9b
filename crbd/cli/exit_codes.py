"""docs/exit-codes.md, generated from the exception family: `python -m crbd.cli.exit_codes > docs/exit-codes.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from crbd.errors import OperatorError

_HEAD = """# Exit codes

`crbd` ends with one of these. Every code but 0 comes with one line on standard error that names the file or the option
and says what to do.

| code | error | meaning |
|---|---|---|
| 0 | | the command did what it was asked to; `serve` was ended by a signal or by a client's SHUTDOWN |
"""


def operator_errors() -> list[type[OperatorError]]:
    """Every kind of error that has an exit code, by that code.

    What the commands in swtpm's place derive of them has no code of its own.
    """
    ours = (kind for kind in _with_children(OperatorError) if kind.__module__ == OperatorError.__module__)
    return sorted(ours, key=lambda kind: kind.exit_code)


def render() -> str:
    """The page."""
    return _HEAD + "".join(f"| {kind.exit_code} | {kind.__name__} | {kind.meaning} |\n" for kind in operator_errors())


def _with_children(kind: type[OperatorError]) -> Iterator[type[OperatorError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _with_children(child)


if __name__ == "__main__":
    sys.stdout.write(render())
