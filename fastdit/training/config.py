"""What a training run is asked to do, as one flat record that is stored with the run."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..models import DiT_models
from ..validation import nearest, require_choice

SIZES = ("hidden_size", "depth", "num_heads", "patch_size")

# What decides the meaning of the weights or the order of the data. A run is resumed with these unchanged.
FIXED = (
    "data",
    "vae",
    "image_size",
    "model",
    *SIZES,
    "conditioning",
    "num_classes",
    "class_dropout_prob",
    "learn_sigma",
    "noise_schedule",
    "batch_size",
    "seed",
    "horizontal_flip",
)


@dataclass
class TrainConfig:
    """Trains a DiT on a folder of images or on the built-in digits. Only the data must be given."""

    data: str
    """A folder with one sub-folder of images per class, of tar shards (webdataset), or of latents that `fastdit
    extract` wrote; "digits": the 1,797 handwritten 8x8 digits of scikit-learn; or "synthetic": random latents."""
    out: str = "runs/train"
    """The run folder: configuration, metrics, pictures and checkpoints."""
    resume: bool = False
    """Continue the run in `out` from its newest whole checkpoint, exactly where it stopped."""
    auto_resume: bool = False
    """Continue the run in `out` where there is one, else begin it: one command for the first start and for all that
    follow, as with torchrun --max-restarts or a scheduler's requeue."""
    init_from: str | None = None
    """Fine-tuning: begin with the EMA weights of this run, checkpoint folder or .safetensors file. For another
    number of classes the label table is drawn anew."""

    resume_from_original: str | None = None
    """Continue a training checkpoint of facebookresearch/DiT or fast-DiT (.pt with model, ema, opt and args): weights,
    averages, Adam's moments and the number of steps. The order of the data begins anew."""

    vae: str | None = None
    """Train on the latents of this AutoencoderKL (a folder or a hub name) instead of on pixels."""
    image_size: int | None = None
    """Height and width to which images are cropped, in pixels. None: 256; the digits are 8."""
    horizontal_flip: bool | None = None
    """Mirror half of the images. None: folders yes; digits are never mirrored."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do about files that cannot be read as an image."""
    num_workers: int | None = None
    """Processes that read images; 0 reads in the training process. None: up to 4, for the digits 0."""

    model: str | None = None
    """A name such as DiT-XL/2. None: the four sizes below, or DiT-S/2 if they are not given either."""
    hidden_size: int | None = None
    """Width D of a model of your own."""
    depth: int | None = None
    """Its number of blocks."""
    num_heads: int | None = None
    """Its number of attention heads; divides the hidden size."""
    patch_size: int | None = None
    """Its patch edge; divides the height and width of what the model is trained on."""
    conditioning: Literal["adaln_zero", "adaln", "cross_attention", "in_context"] = "adaln_zero"
    """How timestep and class reach the blocks."""
    num_classes: int | None = None
    """Rows of the label table, at least the classes in the data. None: the classes in the data."""
    class_dropout_prob: float = 0.1
    """How often a label is replaced by the null class. 0 leaves that class out, and guidance with it."""
    learn_sigma: bool = True
    """Whether the model also predicts the variance."""
    noise_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """The variances of the forward process."""

    steps: int = 400_000
    """Updates of the weights."""
    batch_size: int = 256
    """Images per update, of all processes together."""
    accumulate: int = 1
    """Parts in which a process goes through its share of the batch, one after the other, to need less memory."""
    recompute_blocks: bool = False
    """Keep only the residual stream between the blocks, and compute them again in the backward: less memory, a third
    more arithmetic."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """How timesteps are drawn: evenly as in the paper, or mostly in the middle (Esser et al. 2024)."""
    lr: float = 1e-4
    """Learning rate of AdamW after the warm-up."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate after the warm-up: kept, or lowered to 0 along half a cosine."""
    warmup_steps: int = 0
    """Updates over which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay of AdamW."""
    gradient_clip: float | None = None
    """Largest norm of the whole gradient. None: not clipped."""
    ema_decay: float = 0.9999
    """How much of the averaged weights is kept at each update."""
    more_ema_decays: tuple[float, ...] = ()
    """Averages that are kept besides, in files such as ema-0.999.safetensors; `sample --which ema:0.999`."""
    nonfinite_steps: int = 10
    """A step whose loss or gradient is not finite changes nothing. So many in a row end the run."""
    seed: int = 0
    """Decides initial weights, noise, label dropout and the order of the data."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:1. auto is CUDA where there is one; torchrun's processes take one GPU each."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """How torchrun's processes share the work: each has all weights (ddp), or a shard of weights, gradients, moments
    and averages (fsdp)."""
    collective_timeout: int = 600
    """Seconds after which a process that waits for the others gives up."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """bf16 computes in bfloat16 where that is safe, tf32 as the original does; weights, gradients and averages are
    float32 either way."""
    compile: Literal["auto", "off", "blocks", "whole"] = "auto"
    """torch.compile of each block, or of the whole model. auto is blocks on CUDA, else off."""

    log_every: int = 100
    """Updates between two lines of metrics.jsonl."""
    sample_every: int = 5_000
    """Updates between two grids of samples; 0 draws none."""
    checkpoint_every: int = 5_000
    """Updates between two checkpoints; the last update is always kept."""
    keep_checkpoints: int | None = 3
    """How many of the newest checkpoints are kept. None keeps all."""
    on_save_error: Literal["error", "warn"] = "error"
    """What to do where a checkpoint cannot be written, as on a full disk: end the run, or go on and say so. Metrics and
    pictures that cannot be written are only told."""
    tensorboard: bool = False
    """Write the metrics for TensorBoard too, into the run folder."""
    wandb: str | None = None
    """Send the metrics to this project of Weights & Biases too."""
    cfg_scale: float = 4.0
    """Guidance of the sample grids; without a null class they are drawn unguided."""
    sample_steps: int = 50
    """Sampling steps of the sample grids."""

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Raises TypeError or ValueError for the first field that is not allowed."""
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            setattr(
                self, field.name, _typed(field.name, getattr(self, field.name), hints[field.name])
            )
        self._validate_model()
        self._validate_data()

        if self.resume and self.auto_resume:
            raise ValueError("resume=True and auto_resume=True: allowed is one")
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "nonfinite_steps",
            "collective_timeout",
            "log_every",
            "checkpoint_every",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("steps", self.steps < 10**8, "below 100000000")
        self._require("sample_every", self.sample_every >= 0, "at least 0")
        self._require(
            "keep_checkpoints",
            self.keep_checkpoints is None or self.keep_checkpoints >= 1,
            "at least 1",
        )
        self._require(
            "warmup_steps",
            0 <= self.warmup_steps < self.steps,
            f"from 0 to below steps={self.steps}",
        )
        if self.init_from is not None and self.resume_from_original is not None:
            raise ValueError(
                f"resume_from_original={self.resume_from_original!r} and init_from={self.init_from!r}: allowed is one"
            )
        self._require("seed", 0 <= self.seed < 2**63, "from 0 to below 2**63")
        self._require("sample_steps", 1 <= self.sample_steps <= 1000, "from 1 to 1000")

        self._require("lr", 0 < self.lr < math.inf, "a finite number above 0")
        self._require(
            "weight_decay", 0 <= self.weight_decay < math.inf, "a finite number of at least 0"
        )
        self._require("ema_decay", 0 <= self.ema_decay < 1, "from 0 to below 1")
        every = (self.ema_decay, *self.more_ema_decays)
        fine = all(0 <= decay < 1 for decay in every) and len(set(every)) == len(every)
        self._require(
            "more_ema_decays", fine, "numbers from 0 to below 1, each once, without ema_decay"
        )
        self._require("class_dropout_prob", 0 <= self.class_dropout_prob <= 1, "from 0 to 1")
        self._require("cfg_scale", math.isfinite(self.cfg_scale), "a finite number")
        if self.gradient_clip is not None:
            self._require(
                "gradient_clip",
                0 < self.gradient_clip < math.inf,
                "a finite number above 0, or None",
            )
        self._require(
            "device",
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device),
            "'auto', 'cpu', 'cuda', 'cuda:1'",
        )

    def _validate_model(self) -> None:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.model is not None:
            require_choice("model", self.model, DiT_models)
            if given:
                raise ValueError(
                    f"{given[0]}={getattr(self, given[0])} and model={self.model!r}: allowed is a name, or all of "
                    f"{', '.join(SIZES)}"
                )
        elif given and len(given) < len(SIZES):
            missing = next(name for name in SIZES if name not in given)
            raise ValueError(f"{missing}=None: a model of your own needs all of {', '.join(SIZES)}")
        for name in (*given, "num_classes"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")

    def _validate_data(self) -> None:
        if self.data == "synthetic":
            self._require("vae", self.vae is None, "None for data='synthetic', which are latents")
        if self.data == "digits":
            self._require("image_size", self.image_size in (None, 8), "8 for data='digits'")
            self._require("horizontal_flip", not self.horizontal_flip, "False for data='digits'")
            self._require("vae", self.vae is None, "None for data='digits'")
        self._require("data", self.data != "", "a folder or 'digits'")
        self._require("out", self.out != "", "a folder")
        self._require("image_size", self.image_size is None or self.image_size >= 1, "at least 1")
        self._require(
            "num_workers", self.num_workers is None or self.num_workers >= 0, "at least 0"
        )

    def _require(self, name: str, holds: object, allowed: str) -> None:
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r}: allowed is {allowed}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as they are stored in config.json."""
        record = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in record.items()}

    @classmethod
    def from_json(cls, source: str | Path | dict[str, Any]) -> TrainConfig:
        """The configuration in a JSON file, or in its parsed content.

        Raises ValueError for unknown or missing keys and values that are not allowed, TypeError for wrong types and
        FileNotFoundError for a missing file; each names what it is about.
        """
        record: Any = source
        if not isinstance(source, dict):
            path = Path(source)
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such configuration file")
            try:
                record = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path}: not a JSON file ({error})") from None
            if not isinstance(record, dict):
                raise TypeError(f"{path}: expected a JSON object, got {type(record).__name__}")
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for key in record:
            if key not in names:
                raise ValueError(f"{key}={record[key]!r}: no such option{nearest(key, names)}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in record:
                raise ValueError(f"{field.name}: missing; it has no default")
        return cls(**record)


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` if it is of type `hint`, whole numbers made floats where those are asked for."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if get_origin(kind) is tuple:
            if not isinstance(value, (list, tuple)):
                raise TypeError(f"{name}={value!r}: expected a list, got {type(value).__name__}")
            return tuple(_typed(name, item, get_args(kind)[0]) for item in value)
        if get_origin(kind) is Literal:
            require_choice(name, value, get_args(kind))
            return value
        # True and False are ints to Python, but here they are mistakes.
        if isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    allowed = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    raise TypeError(f"{name}={value!r}: expected {allowed}, got {type(value).__name__}")
