"""Being asked to stop: the first signal waits for the step under way, the second acts at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What terminals, schedulers and torchrun send. SIGUSR1 is what SLURM's --signal is mostly set to.
STOPPING = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until the first of `STOPPING`. The second has the effect that it has without this."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            # The default of SIGUSR1 is to end the process too.
            signal.signal(number, before[number] if number == signal.SIGINT else signal.SIG_DFL)
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
