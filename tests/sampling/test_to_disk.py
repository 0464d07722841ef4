"""Many images on disk: the same bytes from any number of processes, and after a kill."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdit import DiT, Sampler, sample, save_pretrained
from fastdit.distributed import World
from fastdit.sampling import draw_to_disk, to_disk, to_uint8, weights_digest
from fastdit.sampling.graphs import CAPTURING
from tests.rendezvous import rendezvous

ROOT = Path(__file__).parents[2]
LABELS = [i % 4 for i in range(10)]


@pytest.fixture
def model() -> DiT:
    model = DiT(input_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def keep(images: Tensor) -> Tensor:
    return images


def draw(model: DiT, out: Path, among: World = World(), **changes: Any) -> None:  # noqa: B008
    options: dict[str, Any] = {
        "plan": {"seed": 3},
        "decode": keep,
        "cfg_scale": 2.0,
        "seed": 3,
        "batch_size": 3,
        "among": among,
        "progress": False,
    }
    draw_to_disk(Sampler(model, steps=4), LABELS, str(out), **(options | changes))


def expected(model: DiT) -> np.ndarray:
    drawn = sample(model, LABELS, steps=4, cfg_scale=2.0, seed=3, batch_size=3, progress=False)
    return to_uint8(drawn)


def test_the_librarys_images(model: DiT, tmp_path: Path) -> None:
    draw(model, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as opened:
        assert np.array_equal(opened["arr_0"], expected(model))
        assert opened["arr_1"].tolist() == LABELS
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]


class Killed(Exception):
    pass


def test_goes_on_after_a_kill(model: DiT, tmp_path: Path) -> None:
    """What is there is not drawn again; the end is the same bytes."""
    draw(model, tmp_path / "whole.npz")
    decoded: list[int] = []

    def broken(images: Tensor) -> Tensor:
        if len(decoded) == 2:
            raise Killed
        decoded.append(len(images))
        return images

    with pytest.raises(Killed):
        draw(model, tmp_path / "x.npz", decode=broken)
    assert not (tmp_path / "x.npz").exists()
    parts = tmp_path / "x.npz.parts"
    assert sorted(path.name for path in parts.iterdir()) == [
        "00000000.npy",
        "00000001.npy",
        "plan.json",
    ]
    (parts / ".tmp-00000002.npy-1-ab.npy").write_bytes(b"half")
    decoded = []
    draw(model, tmp_path / "x.npz", decode=lambda images: decoded.append(len(images)) or images)
    assert decoded == [3, 1]
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not parts.exists()


def test_parts_of_another_draw_are_not_taken(model: DiT, tmp_path: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        raise Killed

    with pytest.raises(Killed):
        draw(model, tmp_path / "x.npz", decode=broken)
    with pytest.raises(FileExistsError, match=r"x\.npz\.parts: holds parts .* seed=3 and not 4"):
        draw(model, tmp_path / "x.npz", plan={"seed": 4}, seed=4)


def test_all_that_differs_is_named(model: DiT, tmp_path: Path) -> None:
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    before = {"seed": 3, "labels": list(range(1000)), "same": 1, "gone": True}
    (parts / "plan.json").write_text(json.dumps(before))
    with pytest.raises(FileExistsError) as caught:
        draw(model, tmp_path / "x.npz", plan={"seed": 4, "labels": [5], "same": 1})
    said = str(caught.value)
    assert "with seed=3 and not 4, labels=[0, 1, 2, " in said
    assert "... and not [5], gone=True and not None; remove it" in said
    assert "same" not in said
    assert len(said) < 400 + len(str(parts))


def test_killed_while_the_parts_are_removed(
    model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left of them is taken for nobody's: not that of a draw with another seed, either."""
    draw(model, tmp_path / "whole.npz", plan={"seed": 4}, seed=4)
    remove = shutil.rmtree

    def killed(path: Path, **options: Any) -> None:
        if (path / "plan.json").exists():
            (path / "plan.json").unlink()
            raise Killed
        remove(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            draw(model, tmp_path / "x.npz")
    assert list(tmp_path.rglob("0*.npy"))
    draw(model, tmp_path / "x.npz", plan={"seed": 4}, seed=4)
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.npz", "x.npz"]


def test_parts_without_a_plan_are_not_taken(model: DiT, tmp_path: Path) -> None:
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    for block in (0, 1, 7):
        np.save(parts / f"{block:08d}.npy", np.zeros((3, 4, 4, 3), np.uint8))
    (parts / ".tmp-plan.json-1-ab.json").write_bytes(b"half")
    draw(model, tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as opened:
        assert np.array_equal(opened["arr_0"], expected(model))


@pytest.mark.parametrize("out", ["x.npz", "x", "x.png"])
def test_more_parts_than_files_may_be_open(model: DiT, tmp_path: Path, out: str) -> None:
    resource = pytest.importorskip("resource")
    limit = max(map(int, os.listdir("/dev/fd"))) + 20
    parts, count = tmp_path / f"{out}.parts", limit + 1
    parts.mkdir()
    (parts / "plan.json").write_text('{"seed": 3}')
    images = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8)
    for block in range(count):
        np.save(parts / f"{block:08d}.npy", images[block : block + 1])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, before[1]))
    try:
        draw_to_disk(
            Sampler(model, steps=4),
            [0] * count,
            str(tmp_path / out),
            plan={"seed": 3},
            decode=keep,
            cfg_scale=2.0,
            seed=3,
            batch_size=1,
            among=World(),
            progress=False,
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    if out == "x.npz":
        with np.load(tmp_path / out, allow_pickle=False) as opened:
            assert np.array_equal(opened["arr_0"], images)
    elif out == "x":
        assert len(list((tmp_path / out).glob("*.png"))) == count
    else:
        assert (tmp_path / out).exists()


def test_nothing_is_captured_while_images_are_decoded(model: DiT, tmp_path: Path) -> None:
    """Where a decoder runs out of memory torch's allocator gives some back, which no capture allows."""
    free: list[bool] = []

    def look() -> None:
        free.append(CAPTURING.acquire(blocking=False))

    def decode(images: Tensor) -> Tensor:
        looking = threading.Thread(target=look)
        looking.start()
        looking.join()
        return images

    draw(model, tmp_path / "x.npz", decode=decode)
    assert free == [False] * 4
    assert CAPTURING.acquire(blocking=False)
    CAPTURING.release()


class Drawing:
    """How many blocks of 4 steps were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.more, plain = 0, threading.Condition(), DiT.forward_modulated

        def counting(model: DiT, x: Tensor, modulations: Tensor) -> Tensor:
            with self.more:
                self.steps += 1
                self.more.notify_all()
            return plain(model, x, modulations)

        monkeypatch.setattr(DiT, "forward_modulated", counting)

    def begun(self, block: int) -> bool:
        """Whether the drawing of `block` begins; waits for it, but for no longer than any machine may take."""
        with self.more:
            return self.more.wait_for(lambda: self.steps > 4 * block, timeout=30)


def test_the_next_block_is_drawn_while_one_is_decoded(
    model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing = Drawing(monkeypatch)
    waited: list[bool] = []

    def decode(images: Tensor) -> Tensor:
        # The first waits for the drawing of the second, and so on; after the last one comes none.
        waited.append(drawing.begun(min(len(waited) + 1, 3)))
        return images

    draw(model, tmp_path / "x.npz", decode=decode)
    assert waited == [True] * 4
    with np.load(tmp_path / "x.npz", allow_pickle=False) as opened:
        assert np.array_equal(opened["arr_0"], expected(model))


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("where", ["decoded", "written"])
def test_an_error_beside_the_drawing(
    model: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, block: int
) -> None:
    """While the next block is drawn, and after the last one: it comes out, and a second start draws what is missing."""
    draw(model, tmp_path / "whole.npz")
    with monkeypatch.context() as patch:
        drawing = Drawing(patch)
        decoded: list[int] = []
        save = np.save

        def decode(images: Tensor) -> Tensor:
            decoded.append(len(images))
            if len(decoded) == block + 1:
                assert drawing.begun(min(block + 1, 3))
                if where == "decoded":
                    raise Killed
            return images

        def half(file: Any, array: np.ndarray, **options: Any) -> None:
            if len(decoded) == block + 1:
                file.write(b"half")
                raise Killed
            save(file, array, **options)

        patch.setattr(np, "save", half)
        with pytest.raises(Killed):
            draw(model, tmp_path / "x.npz", decode=decode)
    assert not (tmp_path / "x.npz").exists()
    left = sorted(path.name for path in (tmp_path / "x.npz.parts").iterdir())
    assert left == [*(f"{b:08d}.npy" for b in range(block)), "plan.json"]
    decoded = []
    draw(model, tmp_path / "x.npz", decode=lambda images: decoded.append(len(images)) or images)
    assert decoded == [3, 3, 3, 1][block:]
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.npz", "x.npz"]


def test_weights_digest(model: DiT, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the same weights, another one for any that differ in a bit."""
    model.register_buffer("extra", torch.tensor([True, False]), persistent=False)
    whole = weights_digest(model)
    monkeypatch.setattr(to_disk, "PIECE", 7)
    assert weights_digest(model) == whole
    seen = {whole}
    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        with torch.no_grad():
            flat = tensor.view(-1)[-1:].view(torch.uint8)
            flat[0] ^= 1
            seen.add(weights_digest(model))
            flat[0] ^= 1
    assert weights_digest(model) == whole
    seen.add(weights_digest(model.bfloat16()))
    model.register_buffer("renamed", model.extra, persistent=False)
    del model.extra
    seen.add(weights_digest(model))
    assert len(seen) == len(tensors) + 3


def test_bad_options_leave_nothing(model: DiT, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=0"):
        draw(model, tmp_path / "x.npz", batch_size=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [2, 3])
def test_processes_share_the_blocks(
    model: DiT, tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole blocks in turn: every image once. One after the other here, so the first to end is not the last."""
    monkeypatch.setattr(World, "barrier", lambda self: None)
    draw(model, tmp_path / "whole.npz")
    counts = []
    for rank in reversed(range(size)):
        drawn: list[int] = []
        (tmp_path / "x.npz.parts").mkdir(exist_ok=True)
        (tmp_path / "x.npz.parts" / "plan.json").write_text('{"seed": 3}')
        draw(
            model,
            tmp_path / "x.npz",
            World(rank, size, rank),
            decode=lambda images: drawn.append(len(images)) or images,  # noqa: B023
        )
        counts.append(sum(drawn))
    assert sum(counts) == len(LABELS)
    assert min(counts) > 0
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()


# The command, which after its first part waits to be killed: it would else be done before anybody has seen that part.
ONE_PART = """
import threading

from fastdit.cli import main
from fastdit.sampling import to_disk

write = to_disk._Writer._write

def write_and_wait(*block):
    write(*block)
    threading.Event().wait()

to_disk._Writer._write = write_and_wait
main()
"""
HANGING = 600  # seconds: longer than any machine may take


def command(begin: list[str], folder: Path, out: str) -> list[str]:
    options = ["--num", "24", "--batch-size", "2", "--steps", "6", "--out", out]
    return [sys.executable, *begin, "sample", str(folder), *options]


def start(arguments: list[str], folder: Path, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def checkpoint(folder: Path, model: DiT) -> Path:
    folder.mkdir()
    save_pretrained(model, folder)
    description = {
        "format": 1,
        "model": model.config,
        "classes": list("abcd"),
        "diffusion": {"learn_sigma": True, "noise_schedule": "linear"},
        "images": {"space": "pixels", "image_size": 4, "channels": 3},
    }
    (folder / "model.json").write_text(json.dumps(description))
    (folder / "model.safetensors").rename(folder / "ema.safetensors")
    return folder


def test_two_real_processes_killed_and_started_again(model: DiT, tmp_path: Path) -> None:
    """As torchrun starts them; the first time both are killed once each has written a part."""
    pytest.importorskip("tyro")
    folder = checkpoint(tmp_path / "model", model)

    def both(begin: list[str], shared: dict[str, str]) -> list[subprocess.Popen[str]]:
        arguments = command(begin, folder, "x.npz")
        return [start(arguments, tmp_path, RANK=rank, LOCAL_RANK=rank, **shared) for rank in "01"]

    def kill(processes: list[subprocess.Popen[str]]) -> None:
        for process in processes:
            with process:
                process.kill()

    _first_store, shared = rendezvous(2)
    processes = both(["-c", ONE_PART], shared)
    try:
        parts = tmp_path / "x.npz.parts"
        until = time.monotonic() + HANGING
        while len(list(parts.glob("0*.npy"))) < 2:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() < until
            time.sleep(0.01)
    finally:
        kill(processes)
    _second_store, shared = rendezvous(2)
    processes = both(["-m", "fastdit"], shared)
    try:
        for process in processes:
            said, _ = process.communicate(timeout=HANGING)
            assert process.returncode == 0, said
    finally:
        kill(processes)
    one = sample(
        model,
        [i % 4 for i in range(24)],
        steps=6,
        batch_size=2,
        progress=False,
        learn_sigma=True,
    )
    with np.load(tmp_path / "x.npz", allow_pickle=False) as opened:
        assert np.array_equal(opened["arr_0"], to_uint8(one))
    assert json.loads((tmp_path / "x.npz.json").read_text())["num"] == 24
    assert not torch.equal(one[0], one[4])
