"""Where the processes of a run find each other, as torchrun has it: in a store that the one that starts them holds.

A port that is looked for and let go may be somebody else's by the time that the first process listens on it.
"""

from __future__ import annotations

from torch.distributed import TCPStore


def rendezvous(size: int) -> tuple[TCPStore, dict[str, str]]:
    """The store, to be held while they run, and what torchrun says to each of them beside its rank."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    return store, {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
