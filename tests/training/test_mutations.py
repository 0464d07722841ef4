"""The tests of training find faults: see mutations.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.kernels.mutations import ROOT, assert_fits
from tests.training.mutations import MUTATIONS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.training.mutations", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_list_fits_the_source() -> None:
    assert_fits(MUTATIONS)
    assert {len(mutation.tests) for mutation in MUTATIONS} == {1}


def test_the_first_mutation_is_killed() -> None:
    done = run("--only", MUTATIONS[0].name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 killed" in done.stdout


@pytest.mark.slow
def test_every_mutation_is_killed() -> None:
    done = run("--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(MUTATIONS)} of {len(MUTATIONS)} killed" in done.stdout
