"""`import fastdit` needs neither GPU, Triton, a compiled extension nor any extra, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = (
    "triton",
    "tyro",
    "PIL",
    "matplotlib",
    "sklearn",
    "diffusers",
    "flash_attn",
    "xformers",
    "fastdit._C",
)

BLOCK_EXTRAS = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r} or name in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""

USE_EVERYTHING_WITHOUT_EXTRAS = """
import torch
import fastdit
assert not torch.cuda.is_initialized()
for name in fastdit.__all__:
    getattr(fastdit, name)
model = fastdit.DiT(input_size=8, hidden_size=32, depth=2, num_heads=4, num_classes=10)
diffusion = fastdit.create_diffusion("4")
images = fastdit.sample(model, [1, 2], steps=2, progress=False)
assert images.shape == (2, 4, 8, 8)
assert not torch.cuda.is_initialized()
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )


def test_works_without_any_extra() -> None:
    result = run(BLOCK_EXTRAS + USE_EVERYTHING_WITHOUT_EXTRAS)
    assert result.returncode == 0, result.stderr


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, fastdit; print([m for m in ('torch', 'numpy', 'triton', 'tqdm') if m in sys.modules])"
    assert run(code).stdout.strip() == "[]"


def test_misspelt_name() -> None:
    import fastdit

    with pytest.raises(AttributeError, match="DiT_XL2"):
        _ = fastdit.DiT_XL2


def test_dir_is_the_public_interface() -> None:
    import fastdit

    assert {"DiT", "DiT_models", "create_diffusion", "sample", "use_backend", "validate"} <= set(
        dir(fastdit)
    )
