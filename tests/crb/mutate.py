"""Breaks the register model in every small way and sees whether the tests notice: `python -m tests.crb.mutate`.

Mutants: every bit of every word's reset value flipped; every transition of every table sent to every other state, or
ignored; every field of the register table moved by a bit, and declared to vary where it does not, or the other way
round. With `--source`, `crbd.crb` and the saved form also get every comparison, condition and number changed
(mutate_source.py).

Each mutant runs in a child process that is forked after the tests have been collected, and stops at the first failure.
Prints the survivors; the exit status is 1 if there are any. Takes about a minute and a half on one processor, with
`--source` some minutes more.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Final

import pytest

from crbd.crb import spec, states
from crbd.crb.config import CrbConfig
from crbd.crb.spec import Field, Varies
from crbd.crb.states import Request, State

from .mutate_source import changes

HERE: Final = Path(__file__).parent
TESTS: Final = ("spec", "states", "document", "wrong_order", "localities", "chunks", "mappings", "saved", "submit")
"""The fast tests, those that kill most at the front."""


@dataclass(frozen=True)
class Mutant:
    """One way to break it. `apply` does so, in this process and for good."""

    name: str
    apply: Callable[[], None]


def source_mutants() -> Iterator[Mutant]:
    """Of the code itself."""
    for name, apply in changes():
        yield Mutant(name, apply)


def mutants() -> Iterator[Mutant]:
    """All of them."""
    yield from reset_values()
    yield from transitions()
    yield from table_fields()


def reset_values() -> Iterator[Mutant]:
    """Every bit of the 32 words."""
    for word in range(spec.WORDS):
        for bit in range(32):
            yield Mutant(f"reset value of {4 * word:#04x}, bit {bit}", partial(_flip, word, bit))


def _flip(word: int, bit: int) -> None:
    right = spec.reset_words

    def wrong(config: CrbConfig, locality: int) -> tuple[int, ...]:
        words = list(right(config, locality))
        words[word] ^= 1 << bit
        return tuple(words)

    spec.reset_words = wrong


def transitions() -> Iterator[Mutant]:
    """Every entry of every table, and every one that is not there."""
    tables = {"PTP": states.PTP, "PTP_BYPASS": states.PTP_BYPASS, "QEMU": states.QEMU}
    for name, table in tables.items():
        for state in State:
            for request in Request:
                for other in (None, *State):
                    if other is not table.get((state, request)):
                        where = f"{name}: {state.name} --{request.value}--> {other.name if other is not None else '-'}"
                        key = state, request
                        yield Mutant(where, partial(_send, table, key, other))


def _send(table: states.Transitions, key: tuple[State, Request], other: State | None) -> None:
    if other is None:
        del table[key]
    else:
        table[key] = other


def table_fields() -> Iterator[Mutant]:
    """Position, width, and whether it varies, of every field."""
    for register in spec.REGISTERS:
        for field in register.fields:
            where = f"{register.name}.{field.name}"
            for varies in Varies:
                if varies is not field.varies:
                    changed = replace(field, varies=varies)
                    yield Mutant(f"{where} varies: {varies.value}", partial(_replace, field, changed))
            changed = replace(field, low=field.low + 1)
            yield Mutant(f"{where} a bit higher", partial(_replace, field, changed))
            changed = replace(field, width=field.width + 1)
            yield Mutant(f"{where} a bit wider", partial(_replace, field, changed))


def _replace(field: Field, changed: Field) -> None:
    table = []
    for register in spec.REGISTERS:
        fields = tuple(changed if each is field else each for each in register.fields)
        table.append(replace(register, fields=fields))
    vars(spec)["REGISTERS"] = tuple(table)


class Mutation:
    """A pytest plugin that runs the collected tests once for each mutant, in place of once."""

    def __init__(self, chosen: Iterable[Mutant]) -> None:
        self.chosen = chosen
        self.survivors: list[str] = []
        self.tried = 0

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        assert self._survives(session, Mutant("nothing at all", lambda: None)), "the tests fail without any mutation"
        for mutant in self.chosen:
            self.tried += 1
            if self._survives(session, mutant):
                self.survivors.append(mutant.name)
        return True

    def _survives(self, session: pytest.Session, mutant: Mutant) -> bool:
        child = os.fork()
        if child == 0:
            os._exit(_run(session, mutant))
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 0


def _run(session: pytest.Session, mutant: Mutant) -> int:
    """In the child: 0 if every test passes, 1 at the first that does not."""
    mutant.apply()
    items = session.items
    for item, following in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return 1
    return 0


def main() -> int:
    """Exit status: 0 if no mutant survives."""
    parser = argparse.ArgumentParser(prog="python -m tests.crb.mutate", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name contains this")
    parser.add_argument("--source", action="store_true", help="mutants of the code as well")
    arguments = parser.parse_args()
    chosen = [*mutants(), *(source_mutants() if arguments.source else ())]
    mutation = Mutation([mutant for mutant in chosen if arguments.only in mutant.name])
    paths = [str(HERE / f"test_{name}.py") for name in TESTS]
    # Where crbd is installed it is a pytest plugin too, and its mutants are imported before pytest could rewrite it.
    quiet = ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main(
        ["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", "--timeout", "20", *quiet, *paths],
        plugins=[mutation],
    )
    print(f"{mutation.tried} mutants, {len(mutation.survivors)} survive")
    for name in mutation.survivors:
        print(f"  {name}")
    return 1 if mutation.survivors or not mutation.tried else 0


if __name__ == "__main__":
    sys.exit(main())
