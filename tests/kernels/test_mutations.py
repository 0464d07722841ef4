"""The tests of the kernels find faults: see mutations.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.mutations import MUTATIONS, ROOT, Mutation, assert_fits, misplaced

FOLDER = Path(__file__).parent
ROWS = "kernels/rows.py"
# One of every file.
FIRST = {mutation.file: mutation.name for mutation in reversed(MUTATIONS)}.values()


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_list_fits_the_source() -> None:
    assert_fits(MUTATIONS)


def test_every_kernel_is_mutated() -> None:
    kernels = {f"kernels/{f.name}" for f in (ROOT / "kernels").glob("*.py") if _has_kernel(f)}
    assert kernels
    assert kernels <= {mutation.file for mutation in MUTATIONS}


def _has_kernel(file: Path) -> bool:
    return "\n@triton.jit\n" in file.read_text()


def test_a_text_that_is_not_there_once_is_a_fault() -> None:
    faults = misplaced(Mutation(old, ROWS, old, "", ()) for old in ("no such text", "columns < D"))
    assert [re.sub(r"\d+ times", "N times", fault) for fault in faults] == [
        f"{old}: {ROWS} holds the text N times, not once" for old in ("no such text", "columns < D")
    ]


def test_a_mutation_of_every_file_is_killed() -> None:
    done = run(str(FOLDER / "mutations.py"), "--only", *FIRST)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(FIRST)} of {len(FIRST)} killed" in done.stdout


@pytest.mark.slow
def test_every_mutation_is_killed() -> None:
    done = run(str(FOLDER / "mutations.py"), "--jobs", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(MUTATIONS)} of {len(MUTATIONS)} killed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "tests", "message"),
    [
        ("What the kernels", "What kernels", None, "SURVIVED"),
        ("(variance + eps)", "(variance + no_such_name)", None, "BROKEN: exit status 1 NameError"),
        ("(variance + eps)", "(variance)", "tests/no_such_test.py", "exit status 4 unmutated"),
    ],
    ids=["nothing changes", "not by an assertion", "no such test"],
)
def test_what_does_not_count(old: str, new: str, tests: str | None, message: str) -> None:
    """A list of one mutation that is not killed."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import mutations; "
        "tests = (sys.argv[4],) if sys.argv[4] else mutations.MUTATIONS[0].tests; "
        f"one = mutations.Mutation('one', {ROWS!r}, *sys.argv[2:4], tests); "
        "mutations.MUTATIONS = (one,); sys.exit(mutations.main([]))"
    )
    done = run("-c", code, str(FOLDER), old, new, tests or "")
    assert done.returncode == 1, done.stdout + done.stderr
    assert message in done.stdout
