"""Being asked to stop: the first signal waits for the step under way, the second acts at once.

Schedulers send theirs to all processes, and torchrun hands it on again, so what follows the first within seconds is the
same request; but for Ctrl-C, which somebody has pressed twice.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What terminals, schedulers and torchrun send. SIGUSR1 is what SLURM's --signal is mostly set to.
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]
ECHO = 5.0  # seconds


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until the first of `STOPPING`. The second ends the process."""
    received: list[int] = []
    first: list[float] = []

    def note(number: int, frame: FrameType | None) -> None:
        again = bool(received)  # before anything: another signal may come between two lines
        received.append(number)
        first.append(time.monotonic())
        if again:
            if number != signal.SIGINT and time.monotonic() - first[0] < ECHO:
                return
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)  # which ends the process, also of SIGUSR1
            signal.raise_signal(number)

    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may handle signals
        return
    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave_to_the_loop(worker: int) -> None:
    """Of a process that loads data: a signal to all processes would keep the step under way from ending."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
