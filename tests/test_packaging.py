"""The package installs as a wheel and holds what it needs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    "isolation", [[], ["--no-build-isolation"]], ids=["isolated", "not isolated"]
)
def test_wheel(tmp_path: Path, isolation: list[str]) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "-q",
        *isolation,
        "-w",
        str(tmp_path),
        str(source),
    ]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("fastdit-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"fastdit/__init__.py", "fastdit/models/dit.py", "fastdit/reference/dit.py"} <= set(
        names
    )
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]
    target = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-deps",
            "-q",
            "--target",
            str(target),
            str(wheel),
        ],
        check=True,
    )
    code = "import fastdit; fastdit.DiT(8, 2, 4, 32, 1, 4); print(fastdit.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(target) in found.stdout
