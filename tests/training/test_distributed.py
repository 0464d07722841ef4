"""Two processes are one run: the same numbers as one, saved and stopped together, and never left waiting."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fastdit import from_pretrained
from fastdit.data import EpochBatchSampler, open_data
from fastdit.diffusion import create_diffusion
from fastdit.testing import assert_gradient_close
from fastdit.training import TrainConfig, loop

from . import processes
from .processes import (
    Child,
    Runs,
    Server,
    assert_same_run,
    folder_of,
    metrics,
    state_of,
    steps_saved,
)

WAYS = ("ddp", "fsdp")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with processes.served() as server:
        yield server


@pytest.fixture
def runs(server: Server, tmp_path: Path) -> Runs:
    return Runs(server, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of 8 steps in one process and in two, whose checkpoints are all kept."""
    runs = Runs(server, tmp_path_factory.mktemp("undisturbed"))
    ways: dict[str, dict[str, Any]] = {"one": {"size": 1}}
    ways |= {way: {"size": 2, "parallel": way} for way in WAYS}
    found = {}
    for name, options in ways.items():
        gradients = {"kind": "gradients", "file": str(runs.folder / f"{name}.safetensors")}
        faults = [gradients, {"kind": "drawn weights"}]
        found[name] = runs.finish(name, keep_checkpoints=None, faults=faults, **options)
    orders = [runs.order(name, options["size"]) for name, options in ways.items()]
    assert len(orders[0]) == 8
    assert orders[0] == orders[1] == orders[2]  # the same images, and none twice
    return found


def until(holds: Any, children: list[Child]) -> None:
    end = time.monotonic() + processes.PATIENCE
    while not holds():
        assert time.monotonic() < end, "\n".join(child.said for child in children)
        assert not any(child.ended() for child in children), "\n".join(c.said for c in children)
        time.sleep(0.005)


# ------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_those_of_one_process(
    way: str, undisturbed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load_file(f"{undisturbed['one']}.safetensors")
    two = load_file(f"{undisturbed[way]}.safetensors")
    monkeypatch.setattr(loop, "_model", loop._model)  # and what it is after this test
    processes.drawn_weights()
    exact = exact_gradients(undisturbed["one"])
    assert two.keys() == one.keys() == exact.keys()
    assert all(bool(gradient.any()) for gradient in exact.values())
    for name, gradient in two.items():
        assert_gradient_close(name, gradient, exact[name], one[name], summed=8 * 4)


def exact_gradients(run: Path) -> dict[str, torch.Tensor]:
    """Of the first update in float64, with the numbers that it draws."""
    config = TrainConfig.from_json(run / "config.json")
    with torch.random.fork_rng():
        trainer = loop.Trainer(
            TrainConfig(**config.to_dict() | {"out": str(run.parent / "exact")}),
            torch.device("cpu"),
        )
    data = open_data("digits")
    (keys,) = [next(iter(trainer._order(0)))]
    x0 = torch.stack([data[key][0] for key in keys])
    y = torch.tensor([data[key][1] for key in keys])
    t = trainer._timesteps()
    noise = trainer._drawn(torch.randn, *x0.shape[1:])
    y = trainer._dropped(y)
    model = trainer.model.double()
    diffusion = create_diffusion("", **trainer.diffusion_options)
    terms = diffusion.training_losses(model, x0.double(), t, {"y": y}, noise.double())
    terms["loss"].mean().backward()
    return {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("way", WAYS)
def test_curve_is_that_of_one_process(way: str, undisturbed: dict[str, Path]) -> None:
    """N9: every logged number within 2e-5, and all weights and averages.

    A sum over processes, or a mean that is divided once more, is off by a factor of two.
    """
    one, two = metrics(undisturbed["one"]), metrics(undisturbed[way])
    assert len(one) == len(two) == 3
    for line, other in zip(one, two, strict=True):
        assert line == pytest.approx(other, rel=2e-5)
    values, others = (state_of(folder_of(undisturbed[name], 8)) for name in ("one", way))
    assert values.keys() == others.keys()
    for name, value in values.items():
        torch.testing.assert_close(others[name], value, atol=5e-3, rtol=1e-5, msg=name)


@pytest.mark.parametrize("way", ["one", *WAYS])
def test_attention_is_told_once(way: str, undisturbed: dict[str, Path]) -> None:
    """The backend that the model chooses for a process's part of the batch; only the first process says so."""
    run = undisturbed[way]
    size = 1 if way == "one" else 2
    (used,) = from_pretrained(run).attention_in_use(8 // size, training=True).values()
    said = [(run.parent / f"{way}.{rank}.log").read_text() for rank in range(size)]
    assert said[0].count("attention in ") == 1
    assert f", attention in {used}\n" in said[0]
    assert all("attention" not in other for other in said[1:])


@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_averages_follow_the_weights(way: str, runs: Runs) -> None:
    """ema <- ema + (1 - decay) (weight - ema) at every step, of shards too, and for both decays."""
    options: dict[str, Any] = {"steps": 3, "checkpoint_every": 1, "keep_checkpoints": None}
    run = runs.finish("run", size=2, parallel=way, **options)
    states = [state_of(folder_of(run, step)) for step in (1, 2, 3)]
    for before, after in itertools.pairwise(states):
        for average, decay in (("ema", 0.9), ("ema-0.5", 0.5)):
            for name in (key for key in after if key.startswith(f"{average}.")):
                weight = after[name.replace(f"{average}.", "model.", 1)]
                expected = before[name].lerp(weight, 1 - decay)
                torch.testing.assert_close(after[name], expected, atol=1e-7, rtol=1.3e-6, msg=name)
        assert not torch.equal(before["ema.final_layer.linear.bias"],
                               after["ema.final_layer.linear.bias"])  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("conditioning", ["adaln_zero", "adaln", "cross_attention", "in_context"])
def test_every_conditioning(way: str, conditioning: str, runs: Runs) -> None:
    one = runs.finish("one", conditioning=conditioning)
    two = runs.finish("two", conditioning=conditioning, size=2, parallel=way)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert line == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_accumulation(way: str, runs: Runs, undisturbed: dict[str, Path]) -> None:
    weights = [{"kind": "drawn weights"}]
    run = runs.finish("parts", size=2, parallel=way, accumulate=2, faults=weights)
    for line, other in zip(metrics(run), metrics(undisturbed["one"]), strict=True):
        assert line == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bfloat16(way: str, runs: Runs) -> None:
    """Losses within N9's 5e-2 of one process; weights, averages and moments stay float32."""
    one = runs.finish("one", precision="bf16")
    two = runs.finish("two", precision="bf16", size=2, parallel=way)
    for line, other in zip(metrics(one), metrics(two), strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=5e-2, abs=1e-2)
    assert {v.dtype for v in state_of(folder_of(two, 8)).values()} == {torch.float32}


def test_shards_in_bfloat16_leave_stream_timesteps_and_sums_as_they_are(runs: Runs) -> None:
    """FSDP2 would round what goes into the model and its blocks, and its sums of gradients too, if it were let."""
    inputs, gradients = runs.folder / "inputs", runs.folder / "gradients.safetensors"
    faults = [
        {"kind": "inputs", "file": str(inputs)},
        {"kind": "gradients", "file": str(gradients)},
        {"kind": "drawn weights"},
    ]
    options: dict[str, Any] = {
        "precision": "bf16",
        "parallel": "fsdp",
        "steps": 1,
        "warmup_steps": 0,
    }
    runs.finish("run", size=2, faults=faults, **options)
    for rank in range(2):
        seen = [json.loads(line) for line in Path(f"{inputs}.{rank}").read_text().splitlines()]
        assert sorted(seen) == [
            ["images", "torch.float32"],
            *[["stream", "torch.float32"]] * 2,
            ["timesteps", "torch.int64", *[999] * 4],
        ]
    # Of two processes, whose gradients are of eight bits each: a mean in bfloat16 would have eight too.
    found = load_file(gradients)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        if name.startswith("blocks.") and gradient.dim() == 2:
            assert not torch.equal(gradient, gradient.bfloat16().float()), name


# ------------------------------------------------------------------ resumed


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("ddp", 2), ("ddp", 1)),
        (("fsdp", 2), ("ddp", 2)),
        (("ddp", 2), ("fsdp", 2)),
        pytest.param(("ddp", 1), ("fsdp", 2), marks=pytest.mark.slow),
        pytest.param(("fsdp", 2), ("ddp", 1), marks=pytest.mark.slow),
        pytest.param(("ddp", 1), ("ddp", 2), marks=pytest.mark.slow),
        pytest.param(("ddp", 2), ("ddp", 3), marks=pytest.mark.slow),
        pytest.param(("fsdp", 3), ("fsdp", 2), marks=pytest.mark.slow),
    ],
    ids=lambda way: f"{way[0]}{way[1]}",
)  # fmt: skip
def test_checkpoint_is_read_by_other_processes(
    before: tuple[str, int], after: tuple[str, int], runs: Runs
) -> None:
    """All values are those that were saved, to the last bit; then the same images follow, each once.

    A step whose loss is not finite changes nothing: so what is saved after one is what was loaded.
    """
    options = {"batch_size": 12, "nonfinite_steps": 20}
    runs.finish("run", size=before[1], parallel=before[0], steps=4, **options)
    order = runs.order("run", before[1])
    saved = state_of(folder_of(runs.folder / "run", 4))
    assert all(value.isfinite().all() for value in saved.values())
    for trace in runs.folder.glob("*.trace"):
        trace.unlink()
    run = runs.finish(
        "run",
        size=after[1],
        parallel=after[0],
        steps=5,
        resume=True,
        faults=[{"kind": "nan", "steps": [5]}],
        **options,
    )
    loaded = state_of(folder_of(run, 5))
    assert loaded.keys() == saved.keys()
    assert [name for name, value in saved.items() if not torch.equal(loaded[name], value)] == []
    runs.finish("run", size=after[1], parallel=after[0], steps=8, resume=True, **options)
    whole = runs.finish("whole", keep_checkpoints=None, **options)
    assert order + runs.order("run", after[1]) == runs.order("whole")
    assert whole.exists()


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_by_as_many(way: str, runs: Runs, undisturbed: dict[str, Path]) -> None:
    """Both are killed in the sixth step, with checkpoints at 2 and 4."""
    fault = {"kind": "at", "point": "update", "step": 6}
    options: dict[str, Any] = {"size": 2, "parallel": way, "keep_checkpoints": None}
    faults = [{"kind": "drawn weights"}, fault, {**fault, "rank": 1}]
    children = runs.run("run", faults=faults, **options)
    assert [child.status for child in children] == [-9, -9]
    run = runs.finish("run", resume=True, **options)
    assert_same_run(run, undisturbed[way], 8)
    assert steps_saved(run) == [2, 4, 6, 8]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_more_than_two_are_resumed_bit_for_bit(way: str, runs: Runs) -> None:
    """Of more than two terms a sum depends on the order, and the order of a reduction on where a value lies."""
    options: dict[str, Any] = {"size": 4, "parallel": way, "hidden_size": 96}
    whole = runs.finish("whole", **options)
    faults = [{"kind": "at", "point": "update", "step": 6, "rank": rank} for rank in range(4)]
    runs.run("run", faults=faults, **options)
    assert_same_run(runs.finish("run", resume=True, **options), whole, 8)


# The command, of which the second process is killed before it has been restarted.
KILLED_ONCE = """
import os
import signal

from fastdit.cli import main
from fastdit.training.loop import Trainer

update = Trainer._update

def killed_once(self, x0, y):
    if self.step == 50 and (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
        os.kill(os.getpid(), signal.SIGKILL)
    update(self, x0, y)

Trainer._update = killed_once
main()
"""


@pytest.mark.slow
def test_restarted_by_torchrun(runs: Runs) -> None:
    """`torchrun --max-restarts=1`, one of whose processes is killed once."""
    pytest.importorskip("tyro")
    options = processes.options_of(runs.folder, parallel="ddp", steps=80, checkpoint_every=20)
    del options["more_ema_decays"], options["out"]
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]

    def run(name: str, *program: str) -> str:
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1"]
        train = ["train", *arguments, "--auto-resume", f"--out={runs.folder / name}"]
        ended = subprocess.run(
            [sys.executable, *torchrun, "--standalone", "--no-python", sys.executable, *program, *train],
            env={**os.environ, "PYTHONPATH": str(processes.ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stdout
        return ended.stdout

    said = run("run", "-c", KILLED_ONCE)
    assert said.count(f"{runs.folder / 'run'}, step ") == 2, said
    assert said.count(", step 0 of 80") == 1, said
    run("whole", "-m", "fastdit")
    a, b = (state_of(folder_of(runs.folder / name, 80)) for name in ("run", "whole"))
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert metrics(runs.folder / "run") == metrics(runs.folder / "whole")


# ------------------------------------------------------------------ stopped


@pytest.mark.parametrize(
    ("way", "number"),
    [
        ("ddp", signal.SIGTERM),
        ("fsdp", signal.SIGTERM),
        pytest.param("ddp", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
)
def test_signal_to_one_stops_both_after_the_same_step(way: str, number: int, runs: Runs) -> None:
    options: dict[str, Any] = {"size": 2, "parallel": way, "log_every": 1}
    children = runs.start("run", steps=100_000, checkpoint_every=100_000, **options)
    run = runs.folder / "run"
    written = run / "metrics.jsonl"
    until(lambda: written.exists() and written.read_text().count("\n") > 2, children)
    children[1].kill(number)
    assert [child.wait() for child in children] == [0, 0], children[0].said + children[1].said
    (step,) = steps_saved(run)
    assert metrics(run)[-1]["step"] == step
    ranks = [runs.folder / f"run.{rank}.trace" for rank in range(2)]
    assert [len(trace.read_text().splitlines()) for trace in ranks] == [step, step]
    assert f"stopped after step {step:,}, which is saved" in children[0].said
    assert not (run / "run.lock").exists()


@pytest.mark.parametrize("way", WAYS)
def test_signal_to_one_is_known_to_both_one_step_later(way: str, runs: Runs) -> None:
    """Told with the sums of the step under way, here the third, and read in the next."""
    fault = {"kind": "at", "point": "update", "step": 3, "do": "term", "rank": 1}
    run = runs.finish("run", size=2, parallel=way, faults=[fault], checkpoint_every=100)
    assert steps_saved(run) == [4]


# ------------------------------------------------------------------ what is not finite


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "where", ["loss", pytest.param("gradient", marks=pytest.mark.slow)]
)  # fmt: skip
def test_step_that_is_not_finite_in_one_changes_nothing_in_both(
    way: str, where: str, runs: Runs
) -> None:
    options: dict[str, Any] = {"size": 2, "parallel": way, "checkpoint_every": 1}
    options |= {"steps": 4, "keep_checkpoints": None}
    fault = {"kind": "nan", "steps": [3], "rank": 1, "where": where}
    run = runs.finish("run", faults=[fault], **options)
    before, after, last = (state_of(folder_of(run, step)) for step in (2, 3, 4))
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert not torch.equal(
        after["ema.final_layer.linear.bias"], last["ema.final_layer.linear.bias"]
    )
    assert all(value.isfinite().all() for value in last.values())
    (line,) = [json.loads(x) for x in (run / "not_finite.jsonl").read_text().splitlines()]
    assert line["step"] == 3
    if where == "loss":
        assert line["ranks"] == [1]
        assert "rank 1" in line["not_finite"]
    assert sum(record["not_finite"] for record in metrics(run)) == 1


def test_images_of_the_rank_that_was_not_finite_are_named(runs: Runs) -> None:
    run = runs.finish("run", size=2, faults=[{"kind": "nan", "steps": [3], "rank": 1}])
    (line,) = [json.loads(x) for x in (run / "not_finite.jsonl").read_text().splitlines()]
    sampler = EpochBatchSampler(1797, 8, seed=0, start_step=2, rank=1, size=2)
    mine = {index for index, _ in next(iter(sampler))}
    assert mine <= set(line["images"]), "the image that it may be due to is not among those named"


@pytest.mark.parametrize("way", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_too_many_in_a_row_end_both(way: str, runs: Runs) -> None:
    fault = {"kind": "nan", "steps": list(range(3, 20)), "rank": 1}
    children = runs.run("run", size=2, parallel=way, faults=[fault], nonfinite_steps=3)
    assert [child.status for child in children] == [1, 1]
    for child in children:
        assert (
            "FloatingPointError: step 5: the loss in rank 1 is not finite, in 3 steps" in child.said
        )


# ------------------------------------------------------------------ one of them fails

FAILURES = [
    # the point, the rank, slow
    ("first file", 1, False),
    ("all files", 1, True),
    ("empty folder", 1, True),
    ("before the folder", 0, True),
    ("first file", 0, True),
    ("half of the manifest", 0, False),
    ("before the rename", 0, False),
]


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param(point, rank, marks=pytest.mark.slow if slow else ())
        for point, rank, slow in FAILURES
    ],
)
def test_error_of_one_while_saving_ends_both(point: str, rank: int, runs: Runs) -> None:
    fault = {"kind": "at", "point": point, "step": 4, "do": "raise", "rank": rank}
    children = runs.run("run", size=2, faults=[fault])  # long before `collective_timeout`
    assert [child.status for child in children] == [1, 1]
    for child in children:
        assert "injected" in child.said, child.said
    assert processes.saved(runs.folder / "run") == ["step-00000002"]
    assert not (runs.folder / "run" / "run.lock").exists()


@pytest.mark.parametrize(
    ("point", "rank"),
    [
        pytest.param(point, rank, marks=pytest.mark.slow if slow else ())
        for point, rank, slow in [("first file", 1, False), ("before the rename", 0, False),
                                  ("half of the manifest", 0, True), ("random generators", 0, True)]
    ],
)  # fmt: skip
def test_error_of_one_while_saving_is_passed_over_by_both(
    point: str, rank: int, runs: Runs
) -> None:
    fault = {"kind": "at", "point": point, "step": 4, "do": "raise", "rank": rank}
    options: dict[str, Any] = {"size": 2, "on_save_error": "warn", "keep_checkpoints": None}
    children = runs.run("run", faults=[fault], **options)
    assert [child.status for child in children] == [0, 0], children[0].said + children[1].said
    assert processes.saved(runs.folder / "run") == [f"step-0000000{step}" for step in (2, 6, 8)]
    assert "NOT SAVED, the run goes on" in children[0].said
    assert "injected" in children[0].said


@pytest.mark.parametrize("kind", ["OSError", "Error while serializing: File too large"])
def test_writers_other_error_is_passed_over_by_both(kind: str, runs: Runs) -> None:
    """The first process has the error itself, the second a message of it: neither may go on alone."""
    faults = [{"kind": "no space", "step": 4, "what": kind}]
    options: dict[str, Any] = {"size": 2, "on_save_error": "warn", "keep_checkpoints": None}
    children = runs.run("run", faults=faults, **options)
    assert [child.status for child in children] == [0, 0], children[0].said + children[1].said
    assert steps_saved(runs.folder / "run") == [2, 6, 8]


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_shards_that_cannot_be_written_are_passed_over_by_both(rank: int, runs: Runs) -> None:
    faults = [{"kind": "no space for shards", "step": 4, "rank": rank}]
    options: dict[str, Any] = {"size": 2, "parallel": "fsdp", "keep_checkpoints": None}
    children = runs.run("run", faults=faults, on_save_error="warn", **options)
    assert [child.status for child in children] == [0, 0], children[0].said + children[1].said
    assert steps_saved(runs.folder / "run") == [2, 6, 8]
    assert "NOT SAVED, the run goes on" in children[0].said
    assert "No space left" in children[0].said


@pytest.mark.parametrize("point", ["update", "all files"])
def test_one_is_killed(point: str, runs: Runs) -> None:
    """Of training, or of saving: the other ends with an error, and the run goes on from what was saved before."""
    fault = {"kind": "at", "point": point, "step": 4, "rank": 1}
    faults = [{"kind": "saves at once"}, fault]
    children = runs.run("run", size=2, faults=faults)  # long before `collective_timeout`
    assert children[1].status == -9
    assert children[0].status == 1, children[0].said
    assert steps_saved(runs.folder / "run") == [2]
    runs.finish("run", size=2, resume=True)


@pytest.mark.parametrize("point", [pytest.param("update", marks=pytest.mark.slow), "all files"])
def test_one_stands_still(point: str, runs: Runs) -> None:
    """Stopped, so that its connections stay open: the other gives up after `collective_timeout`."""
    fault = {"kind": "at", "point": point, "step": 4, "do": "stop", "rank": 1}
    children = runs.start("run", size=2, faults=[fault], collective_timeout=15)
    try:
        assert children[0].wait() == 1
    finally:
        children[1].kill()
    assert steps_saved(runs.folder / "run") in ([], [2])  # it may have been on its way to the disk


@pytest.mark.parametrize("options", [{"batch_size": 9}, {"batch_size": 8, "accumulate": 3}])
def test_batch_that_cannot_be_shared(options: dict[str, Any], runs: Runs) -> None:
    children = runs.run("run", size=2, **options)
    for child in children:
        assert child.status == 1
        assert f"ValueError: batch_size={options['batch_size']}: must be divisible" in child.said
    assert not (runs.folder / "run").exists()


def test_what_is_wrong_with_the_folder_is_said_by_both(runs: Runs) -> None:
    (runs.folder / "run").write_text("a file")
    for child in runs.run("run", size=2):
        assert child.status == 1
        assert "expected a folder, this is a file" in child.said
