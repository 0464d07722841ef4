"""The tests of training find faults: see mutations.py."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter

import pytest

from tests.kernels.mutations import ROOT, misplaced
from tests.training.mutations import MUTATIONS


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.training.mutations", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_list_fits_the_source() -> None:
    """What is to be replaced is there once, what comes of it is Python, and the test that is named exists."""
    assert misplaced(MUTATIONS) == []
    assert [name for name, count in Counter(m.name for m in MUTATIONS).items() if count > 1] == []
    for mutation in MUTATIONS:
        source = (ROOT / mutation.file).read_text()
        ast.parse(source.replace(mutation.old, mutation.new), mutation.name)
        assert mutation.new != mutation.old, mutation.name
        (test,) = mutation.tests
        file, name = re.match(r"(.*\.py)::(\w+)", test).groups()
        assert f"def {name}(" in (ROOT / file).read_text(), test


def test_the_first_mutation_is_killed() -> None:
    done = run("--only", MUTATIONS[0].name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 1 killed" in done.stdout


@pytest.mark.slow
def test_every_mutation_is_killed() -> None:
    done = run("--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(MUTATIONS)} of {len(MUTATIONS)} killed" in done.stdout
