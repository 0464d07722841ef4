"""What every test gets: one thread, no network, and files of the original's outputs."""

from __future__ import annotations

import os

# Results on CPU depend on the number of threads, and two test processes share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Without a GPU the kernels run in Triton's interpreter, which has to be chosen before triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from tests import interpreter
from tests.counts import GPU_TESTS

GOLDEN = Path(__file__).parent / "golden"
torch.set_num_threads(1)
tqdm.monitor_interval = 0  # its thread could hold tqdm's lock when a test forks
if os.environ.get("TRITON_INTERPRET") == "1":
    interpreter.correct()


# First, before `-m` takes any away.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[GPU_TESTS] = sum("gpu" in item.keywords for item in items)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden_config() -> dict[str, Any]:
    return json.loads((GOLDEN / "tiny_dit.config.json").read_text())


@pytest.fixture(scope="session")
def golden_weights() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny_dit.weights.safetensors")


@pytest.fixture(scope="session")
def golden_tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny_dit.tensors.safetensors")
