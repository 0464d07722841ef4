"""`fastdit demo`: from nothing to drawn digits in a few minutes, and whether they are any good.

Trains a small DiT on the 1,797 handwritten digits of scikit-learn, draws ten of each class with guidance, and measures
two things in the same run: whether a classifier trained on the real digits reads the class that was asked for, and
whether the drawn digits are copies of real ones.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .data import Digits
from .files import PathLike, atomic_file, read_json, write_json, write_text
from .sampling import Images, sample, save_grid, to_uint8
from .training import TrainConfig, train
from .training.metrics import read_metrics
from .training.plots import COLOR, missing_packages, smoothed
from .weights import from_pretrained, latest_checkpoint, load_description

CFG_SCALE = 2.0
PER_CLASS = 10
SAMPLING_STEPS = 100


def demo(out: PathLike = "runs/demo", *, steps: int = 1800) -> dict[str, Any]:
    """Trains, samples and reports; returns what report.json holds.

    `out` is a run folder as `fastdit train` writes it, and in it `samples.png` (a row for each class), `report.md`,
    `report.json` and `demo.png` (the grid beside the loss curve). An earlier demo in `out` is replaced.

    Raises ImportError without scikit-learn, matplotlib or Pillow, and FileExistsError where `out` holds anything else
    than a demo.
    """
    folder = Path(out)
    digits = Digits()
    if missing := missing_packages():
        raise ImportError(f'the demo needs {" and ".join(missing)}: pip install "fastdit[demo]"')
    config = _configuration(folder, steps)
    _make_way(folder, config)
    started = time.perf_counter()
    train(config)
    if latest_checkpoint(folder).name != f"step-{steps:08d}":  # a signal asked to stop
        raise KeyboardInterrupt
    training_seconds = time.perf_counter() - started

    model = from_pretrained(folder)
    labels = [label for label in range(len(digits.classes)) for _ in range(PER_CLASS)]
    started = time.perf_counter()
    drawn = sample(
        model,
        labels,
        steps=SAMPLING_STEPS,
        cfg_scale=CFG_SCALE,
        batch_size=len(labels),
        **load_description(folder)["diffusion"],
    )
    sampling_seconds = time.perf_counter() - started
    images = to_uint8(drawn)
    save_grid(255 - images, folder / "samples.png", columns=PER_CLASS)  # ink on paper

    metrics = read_metrics(folder / "metrics.jsonl")
    report = {
        "run": str(folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "training_seconds": round(training_seconds, 1),
        "steps_per_second": round(steps / training_seconds, 1),
        "loss": float(np.mean([line["loss"] for line in metrics[-max(1, len(metrics) // 10) :]])),
        "samples": len(labels),
        "sampling_seconds": round(sampling_seconds, 1),
        "sampling_steps": SAMPLING_STEPS,
        "cfg_scale": CFG_SCALE,
        "label_agreement": label_agreement(images, labels),
        "neighbours": nearest_neighbours(images),
    }
    write_json(folder / "report.json", report)
    write_text(folder / "report.md", _as_markdown(report))
    _draw_picture(folder, metrics, report)
    print((folder / "report.md").read_text())
    return report


def label_agreement(images: Images, labels: Sequence[int] | npt.NDArray[np.int64]) -> float:
    """The share of drawn digits that a classifier reads as the class that was asked for.

    `images` (N, 8, 8, 1) uint8 and `labels` (N,), as in the .npz of `fastdit sample`. The classifier is scikit-learn's
    SVC(gamma=0.001) trained on all 1,797 real digits, pixels from 0 to 16.
    """
    from sklearn.svm import SVC

    digits = Digits()
    classifier = SVC(gamma=0.001).fit(_pixels(to_uint8(digits.images)), digits.labels.numpy())
    return float(np.mean(classifier.predict(_pixels(images)) == np.asarray(labels)))


def nearest_neighbours(images: Images) -> dict[str, float]:
    """Whether drawn digits (N, 8, 8, 1) uint8 are copies of real ones.

    Euclidean distances over the 64 pixels from 0 to 16: the median over drawn digits to the nearest real one, the
    median over real digits to the nearest other real one, and the share of drawn digits that are nearer to a real one
    than the closest pair of real digits is. Copies would give a first number far below the second, and a share above 0.
    """
    real = _pixels(to_uint8(Digits().images))
    drawn = _distances(_pixels(images), real).min(1)
    between = _distances(real, real)
    np.fill_diagonal(between, np.inf)
    others = between.min(1)
    return {
        "median_to_real": float(np.median(drawn)),
        "median_between_real": float(np.median(others)),
        "share_nearer_than_closest_real_pair": float(np.mean(drawn < others.min())),
    }


def _pixels(images: Images) -> npt.NDArray[np.float64]:
    """(N, 8, 8, 1) uint8 -> (N, 64) from 0 to 16, as scikit-learn has the digits."""
    return images.reshape(len(images), -1) / 255 * 16


def _distances(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    return np.sqrt(squares.clip(min=0))


def _configuration(folder: Path, steps: int) -> TrainConfig:
    return TrainConfig(
        data="digits",
        out=str(folder),
        hidden_size=128,
        depth=4,
        num_heads=4,
        patch_size=2,
        steps=steps,
        batch_size=64,
        lr=2e-3,
        lr_schedule="cosine",
        warmup_steps=min(100, steps // 10),
        ema_decay=0.995,
        log_every=max(1, min(20, steps // 10)),
        sample_every=0,
        checkpoint_every=steps,
    )


def _make_way(folder: Path, config: TrainConfig) -> None:
    """Removes an earlier demo, and nothing else."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    new = config.to_dict()
    try:
        old = read_json(folder / "config.json")
        same = all(old[key] == new[key] for key in ("data", "hidden_size", "lr", "ema_decay"))
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    if not same:
        raise FileExistsError(f"out={str(folder)!r}: holds something else than an earlier demo")
    shutil.rmtree(folder)


def _as_markdown(report: dict[str, Any]) -> str:
    near = report["neighbours"]
    rows = {
        "Parameters": f"{report['parameters']:,}",
        "Training": f"{report['steps']:,} steps in {report['training_seconds']:.0f} s,"
        f" {report['steps_per_second']:.1f} steps/s",
        "Loss at the end": f"{report['loss']:.3f}",
        "Sampling": f"{report['samples']} images in {report['sampling_seconds']:.1f} s,"
        f" {report['sampling_steps']} DDPM steps with guidance {report['cfg_scale']:g}",
        "Read as the class asked for": f"{report['label_agreement']:.0%} of the images, by an SVC trained on the real"
        " digits",
        "Distance to the nearest real digit": f"{near['median_to_real']:.1f} (median); between a real digit and the"
        f" nearest other one {near['median_between_real']:.1f}",
        "Nearer to a real digit than any two real digits are": "{:.0%} of the images".format(
            near["share_nearer_than_closest_real_pair"]
        ),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Handwritten digits, drawn by a small DiT

| | |
|---|---|
{table}

`samples.png` has a row for each class. More of them:

    fastdit sample {report["run"]} --num 500 --cfg-scale {report["cfg_scale"]:g} --out digits.npz
"""


def _draw_picture(folder: Path, metrics: list[dict[str, Any]], report: dict[str, Any]) -> None:
    """demo.png, 900 pixels wide: the grid beside the loss curve."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    grid = imread(folder / "samples.png")
    size, margin = grid.shape[0], 24
    width, height = 900, size + 2 * margin
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    # The grid keeps its pixels: nothing is resampled.
    left = figure.add_axes((margin / width, margin / height, size / width, size / height))
    left.imshow(grid, cmap="gray", interpolation="none")
    left.axis("off")

    steps = [record["step"] for record in metrics]
    losses = [record["loss"] for record in metrics]
    start = size + 90
    right = figure.add_axes(
        (start / width, 70 / height, (width - start - margin) / width, (height - 180) / height)
    )
    right.plot(steps, losses, color=COLOR, alpha=0.25, linewidth=0.8)
    right.plot(steps, smoothed(losses, span=len(losses) / 25), color=COLOR, linewidth=2)
    right.set_yscale("log")
    right.set_yticks([0.05, 0.1, 0.2, 0.5, 1])
    right.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylim(0.9 * min(losses), 1.1 * max(losses))
    right.set_xlabel("step")
    right.set_ylabel("training loss")
    right.grid(color="0.9", linewidth=0.8)
    right.spines[["top", "right"]].set_visible(False)
    figure.text(
        start / width,
        1 - 62 / height,
        f"{report['parameters'] / 1e6:.1f}M parameters, {report['steps']:,} steps\n"
        f"{report['label_agreement']:.0%} read as the digit asked for\n"
        f"{report['neighbours']['share_nearer_than_closest_real_pair']:.0%} copies, by nearest neighbour",
        va="center",
        linespacing=1.4,
    )
    with atomic_file(folder / "demo.png") as temporary:
        figure.savefig(temporary, format="png")
