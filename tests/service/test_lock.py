"""The engine lock: commands wait for everybody else, and everybody else is not starved by commands."""

from __future__ import annotations

import threading

from crbd.service.lock import EngineLock

PATIENCE = 10.0


def test_a_command_waits_while_somebody_else_has_or_wants_the_engine() -> None:
    lock = EngineLock()
    passed = threading.Event()

    def command() -> None:
        if lock.contested():
            lock.let_others_go_first()
        with lock.engine:
            passed.set()

    with lock:
        thread = threading.Thread(target=command)
        thread.start()
        assert not passed.wait(0.05)
    assert passed.wait(PATIENCE)
    thread.join()


def test_commands_without_a_pause_do_not_starve_a_control_command() -> None:
    lock = EngineLock()
    ended = threading.Event()
    executed = 0

    def flood() -> None:
        nonlocal executed
        while not ended.is_set():
            if lock.contested():
                lock.let_others_go_first()
            with lock.engine:
                executed += 1

    thread = threading.Thread(target=flood)
    thread.start()
    for _ in range(20):
        with lock:
            seen = executed
            assert seen == executed, "nobody else is in"
    ended.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()
