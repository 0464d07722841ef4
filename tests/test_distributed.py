"""The processes of a run: they meet more than once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.rendezvous import rendezvous

TWO_TURNS = """
from datetime import timedelta
from torch.distributed.distributed_c10d import _get_default_store
from fastdit.distributed import world

for turn in range(2):
    with world(timeout=timedelta(seconds=600)) as found:
        store, key = _get_default_store(), f"left by {found.rank}"
        print(found.gathered((turn, found.rank, store.check([key]))))
        store.set(key, "")
"""


def test_a_process_can_enter_again() -> None:
    """The store outlives a turn, and with it the addresses of the first; no other turn may find what is left there.

    Processes that find old addresses fail or not, by who is first; so it is also looked for what they have left.
    """
    # The store goes with its last reference, so it has a name although nothing asks for it.
    _store, environment = rendezvous(2)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_TURNS],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
            env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]
    try:
        for child in children:
            said, errors = child.communicate(timeout=600)
            turns = [[(turn, rank, False) for rank in range(2)] for turn in range(2)]
            assert said.splitlines() == [str(turn) for turn in turns], errors
    finally:
        for child in children:
            child.kill()
            child.communicate()
