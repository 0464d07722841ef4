"""Faults of training that its tests must find: each is put into a copy of the source, where its test must then fail.

    python -m tests.training.mutations [--only NAME ...] [--jobs 2]

See `tests/kernels/mutations.py`, which does it, and says what counts. Here every mutation names one test, a cheap one
that notices it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from tests.kernels import mutations as machinery
from tests.kernels.mutations import Mutation

CHECKPOINT, LOOP = "fastdit/training/checkpoint.py", "fastdit/training/loop.py"
OPTIMIZER, PARALLEL = "fastdit/training/optimizer.py", "fastdit/training/parallel.py"
ADAMW, FILES, RUNS = "fastdit/ops/adamw_ema.py", "fastdit/files.py", "fastdit/weights/runs.py"
SAMPLER, IMAGES, EXTRACT = (f"fastdit/data/{name}.py" for name in ("sampler", "images", "extract"))


def _training(file: str, test: str) -> tuple[str]:
    return (f"tests/training/test_{file}.py::test_{test}",)


def _data(file: str, test: str) -> tuple[str]:
    return (f"tests/data/test_{file}.py::test_{test}",)


RESUMED = _training("resume", "resumed_run_is_the_uninterrupted_one[10-13]")
GENERATORS = _training("saving", "global_generators_go_on")
HELD = _training("saving", "training_goes_on_while_a_checkpoint_is_written")
CONTENT = _training("loop", "checkpoint_can_be_loaded_and_says_what_it_is")
BY_HAND = _training("loop", "update_is_that_of_adamw_written_by_hand")
ACCUMULATED = _training("loop", "accumulated_gradients_are_those_of_the_whole_batch[2]")
NOT_FINITE = _training(
    "loop",
    "step_that_is_not_finite_changes_nothing_and_the_run_goes_on[loss-the loss in rank 0-ranks0]",
)
TWO = _training("distributed", "curve_is_that_of_one_process[ddp]")
SHARDS = _training("distributed", "shards_in_bfloat16_leave_stream_timesteps_and_sums_as_they_are")
WITHOUT_MANIFEST = _training("saving", "folder_without_a_manifest_is_no_checkpoint")
RENAMED = _training("saving", "checkpoint_that_cannot_be_renamed_is_told_and_the_run_goes_on")


def _on_disk(what: str) -> tuple[str]:
    return (
        f"tests/test_files.py::test_everything_is_on_disk_before_the_rename_and_the_name_after[{what}]",
    )


# The first is what `make test` runs.
MUTATIONS = (
    # What a resumed run takes up.
    Mutation(
        "resume: data from the first batch",
        LOOP,
        "batch_sampler=self._order(self.step),",
        "batch_sampler=self._order(0),",
        RESUMED,
    ),
    Mutation(
        "save: manifest before the moments",
        CHECKPOINT,
        """                write_manifest(folder, {"step": staged.step, **written})
                unfinished.close()  # it gets its name
                keep_newest(self.run, self.keep)

            folder: Path = self.world.gathered(self._together(begin, only_first=True), self.group)[
                0
            ]
            self._together(lambda: self._write_own(folder, staged))
""",
        """                unfinished.close()
                keep_newest(self.run, self.keep)

            folder: Path = self.world.gathered(self._together(begin, only_first=True), self.group)[
                0
            ]
            self._together(lambda: self._write_own(folder, staged))
            record = {"step": staged.step, "processes": 1, "torch": torch.__version__}
            write_manifest(folder, record)
""",
        CONTENT,
    ),
    Mutation(
        "resume: weights not restored",
        LOOP,
        'checkpoint.load_models(self.previous, {"model": model, **averages})',
        "checkpoint.load_models(self.previous, averages)",
        RESUMED,
    ),
    Mutation(
        "resume: averages not restored",
        LOOP,
        'checkpoint.load_models(self.previous, {"model": model, **averages})',
        'checkpoint.load_models(self.previous, {"model": model})',
        RESUMED,
    ),
    Mutation(
        "resume: optimizer not restored",
        CHECKPOINT,
        '    _load_optimizer(path / "optimizer", trained.optimizer, world)\n',
        "",
        RESUMED,
    ),
    Mutation(
        "resume: the run's generator not restored",
        CHECKPOINT,
        '    generator.set_state(states["run"])\n',
        "",
        RESUMED,
    ),
    Mutation(
        "resume: torch's generator not restored",
        CHECKPOINT,
        '    torch.set_rng_state(states["cpu"])\n',
        "",
        GENERATORS,
    ),
    Mutation(
        "resume: NumPy's generator not restored",
        CHECKPOINT,
        '    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))\n',
        "",
        GENERATORS,
    ),
    Mutation(
        "resume: half of a pair of NumPy's normal numbers forgotten",
        CHECKPOINT,
        "int(position), int(has_gauss), gauss))",
        "int(position), 0, 0.0))",
        GENERATORS,
    ),
    Mutation(
        "resume: Python's generator not restored",
        CHECKPOINT,
        "    random.setstate((3, words, next_gauss[0] if next_gauss else None))\n",
        "",
        GENERATORS,
    ),
    Mutation(
        "resume: half of a pair of Python's normal numbers forgotten",
        CHECKPOINT,
        "next_gauss[0] if next_gauss else None",
        "None",
        GENERATORS,
    ),
    Mutation(
        "resume: one step further",
        LOOP,
        'self.step, self.seconds = state["step"], state["seconds"]',
        'self.step, self.seconds = state["step"] + 1, state["seconds"]',
        RESUMED,
    ),
    Mutation(
        "resume: learning rate from its first step",
        LOOP,
        "rate = learning_rate(self.config, self.step)",
        "rate = learning_rate(self.config, self.step - int(self.previous.name[5:] if self.previous else 0))",
        RESUMED,
    ),
    Mutation(
        "resume: sums since the last line forgotten",
        LOOP,
        'self.sums.copy_(torch.tensor(state["sums_since_log"]))',
        "self.sums.zero_()",
        RESUMED,
    ),
    Mutation(
        "resume: steps since the last line forgotten",
        LOOP,
        'self.summed = state["steps_since_log"]',
        "self.summed = 0",
        RESUMED,
    ),
    Mutation(
        "resume: steps in a row that were not finite forgotten",
        LOOP,
        'self.bad_in_a_row = state["not_finite_in_a_row"]',
        "self.bad_in_a_row = 0",
        _training("loop", "steps_in_a_row_are_counted_across_a_resume[1]"),
    ),
    Mutation(
        "resume: not the newest checkpoint",
        CHECKPOINT,
        "for path in reversed(found):",
        "for path in found:",
        _training("resume", "damaged_checkpoint_is_passed_over_for_an_older_one[missing]"),
    ),
    # What is on the disk, and when.
    Mutation(
        "save: the run waits for the disk",
        CHECKPOINT,
        "        self.thread.start()\n",
        "        self.thread.start()\n        self.thread.join()\n",
        HELD,
    ),
    Mutation(
        "save: not a copy",
        CHECKPOINT,
        "return copy.copy_(value.detach(), non_blocking=True)",
        "return value.detach()",
        HELD,
    ),
    Mutation(
        "save: one step further",
        LOOP,
        'state = {\n                "step": self.step,',
        'state = {\n                "step": self.step + 1,',
        _training("loop", "run_folder"),
    ),
    Mutation(
        "save: folder renamed before it is on the disk",
        FILES,
        """                for name in files:
                    os.chmod(Path(folder, name), mode)
                    _sync(Path(folder, name))
                _sync(Path(folder))
            _require_absent(path, target)
            os.rename(temporary, target)
""",
        """                for name in files:
                    os.chmod(Path(folder, name), mode)
            _require_absent(path, target)
            os.rename(temporary, target)
            for folder, _, files in os.walk(target, topdown=False):
                for name in files:
                    _sync(Path(folder, name))
                _sync(Path(folder))
""",
        _on_disk("atomic_folder"),
    ),
    Mutation(
        "save: file renamed before it is on the disk",
        FILES,
        "            _sync(temporary)\n            os.replace(temporary, target)\n",
        "            os.replace(temporary, target)\n            _sync(target)\n",
        _on_disk("atomic_file"),
    ),
    Mutation(
        "save: a folder's new name not on the disk",
        FILES,
        "            os.rename(temporary, target)\n            _sync(target.parent)\n",
        "            os.rename(temporary, target)\n",
        _on_disk("atomic_folder"),
    ),
    Mutation(
        "checkpoints: without a manifest too",
        RUNS,
        "return sorted(path for path in found if (path / manifest.NAME).is_file())",
        "return sorted(found)",
        WITHOUT_MANIFEST,
    ),
    Mutation(
        "checkpoints: a folder without a manifest is whole",
        "fastdit/weights/manifest.py",
        'return [f"{manifest}: missing, so {folder.name} was never finished"]',
        "return []",
        WITHOUT_MANIFEST,
    ),
    Mutation(
        "checkpoints: one too few kept",
        CHECKPOINT,
        "checkpoints(run)[:-count] if count",
        "checkpoints(run)[: 1 - count or None] if count",
        _training("loop", "only_the_newest_checkpoints_are_kept"),
    ),
    Mutation(
        "checkpoints: one that stays is not told",
        CHECKPOINT,
        '            warnings.warn(f"{path}: not removed: {error}", stacklevel=2)\n',
        "",
        RENAMED,
    ),
    Mutation(
        "checkpoints: emptied under its name",
        CHECKPOINT,
        'nameless = path.rename(path.with_name(f".tmp-{path.name}-removed"))',
        "nameless = path",
        RENAMED,
    ),
    # The update.
    Mutation(
        "update: learning rate of the next step",
        LOOP,
        "rate = learning_rate(self.config, self.step)",
        "rate = learning_rate(self.config, self.step + 1)",
        BY_HAND,
    ),
    Mutation(
        "update: gradients of all steps",
        LOOP,
        "        self.optimizer.zero_grad()\n        self.sums",
        "        self.sums",
        RESUMED,
    ),
    Mutation(
        "update: not clipped",
        LOOP,
        "self.optimizer.update(rate, clip=clip, found_inf=~finite)",
        "self.optimizer.update(rate, found_inf=~finite)",
        _training("loop", "gradient_is_clipped_to_the_norm_asked_for"),
    ),
    Mutation(
        "update: labels not dropped",
        LOOP,
        "        y = self._dropped(y)\n",
        "",
        _training("loop", "loss_of_a_run_is_that_of_the_diffusion"),
    ),
    Mutation(
        "update: gradient of the sum of all parts",
        LOOP,
        '(terms["loss"].mean() / parts).backward()',
        'terms["loss"].mean().backward()',
        ACCUMULATED,
    ),
    Mutation(
        "update: loss of the sum of all parts",
        LOOP,
        "value.detach().mean() / parts",
        "value.detach().mean()",
        ACCUMULATED,
    ),
    Mutation(
        "not finite: changes everything",
        LOOP,
        "self.optimizer.update(rate, clip=clip, found_inf=~finite)",
        "self.optimizer.update(rate, clip=clip)",
        NOT_FINITE,
    ),
    Mutation(
        "not finite: the average follows",
        ADAMW,
        "bool(found_inf):  # nobody waits for a device here\n            return\n",
        """bool(found_inf):
            for i, decay in enumerate(ema_decays):
                torch._foreach_lerp_(list(emas[i * n : (i + 1) * n]), list(params), 1 - decay)
            return
""",
        NOT_FINITE,
    ),
    Mutation(
        "not finite: in the sums",
        LOOP,
        "self.sums += torch.where(finite, values, 0)",
        "self.sums += values",
        NOT_FINITE,
    ),
    Mutation(
        "average: of other weights than the run begins with",
        LOOP,
        "averages = {name: averaged_copy(model) for name in names}",
        "averages = {name: averaged_copy(DiT(**model.config)) for name in names}",
        _training("loop", "average_follows_every_update"),
    ),
    Mutation(
        "average: copied before the weights are loaded",
        LOOP,
        """            _initialise(model, config.init_from)
        decays = (config.ema_decay, *config.more_ema_decays)
        names = ["ema", *(f"ema-{decay}" for decay in config.more_ema_decays)]
        averages = {name: averaged_copy(model) for name in names}
""",
        """            fresh = averaged_copy(model)
            _initialise(model, config.init_from)
        else:
            fresh = model
        decays = (config.ema_decay, *config.more_ema_decays)
        names = ["ema", *(f"ema-{decay}" for decay in config.more_ema_decays)]
        averages = {name: averaged_copy(fresh) for name in names}
""",
        _training("loop", "fine_tuning_begins_with_the_averaged_weights"),
    ),
    Mutation(
        "average: all with the decay of the first",
        OPTIMIZER,
        "self.decays = [decay for _, decay in averages]",
        "self.decays = [averages[0][1] for _ in averages]",
        _training("loop", "more_averages"),
    ),
    # The order of the data.
    Mutation(
        "data: the same order in every epoch",
        SAMPLER,
        "manual_seed(derived_seed(self.seed, epoch))",
        "manual_seed(derived_seed(self.seed, 0))",
        _data("sampler", "epochs_and_seeds_have_their_own_order"),
    ),
    Mutation(
        "data: items are not told the epoch",
        SAMPLER,
        "yield [(index, epoch) for",
        "yield [(index, 0) for",
        _data("sampler", "every_index_at_most_once_per_epoch"),
    ),
    Mutation(
        "data: the same flips in every epoch",
        IMAGES,
        "is_flipped(self.seed, epoch, index)",
        "is_flipped(self.seed, 0, index)",
        _data("images", "flip_is_a_function_of_seed_epoch_and_index"),
    ),
    Mutation(
        "data: the same part in every process",
        SAMPLER,
        "slice(rank * batch_size // size, (rank + 1) * batch_size // size)",
        "slice(0, batch_size // size)",
        _data("sampler", "parts_of_all_processes_are_the_batch[2]"),
    ),
    Mutation(
        "extract: finished before the others are",
        EXTRACT,
        "    barrier()\n    if rank == 0:\n        _finish",
        "    if rank == 0:\n        _finish",
        _data("extract", "two_real_processes_write_what_one_writes"),
    ),
    Mutation(
        "extract: every process makes everything",
        EXTRACT,
        "wanted = [k for k in range(rank, shards, size) if",
        "wanted = [k for k in range(shards) if",
        _data("extract", "two_real_processes_write_what_one_writes"),
    ),
    # Several processes.
    Mutation(
        "processes: the same noise in all",
        LOOP,
        "device=self.device)[self.part]",
        "device=self.device)[: self.part.stop - self.part.start]",
        TWO,
    ),
    Mutation(
        "processes: another seed in each",
        LOOP,
        "manual_seed(derived_seed(config.seed, 0))",
        "manual_seed(derived_seed(config.seed, self.world.rank))",
        TWO,
    ),
    Mutation(
        "processes: losses divided and not summed",
        LOOP,
        "dist.all_reduce(told)",
        "dist.all_reduce(told[len(losses) :])",
        TWO,
    ),
    Mutation(
        "processes: all say what runs",
        LOOP,
        "        if self.world.rank == 0:\n            print(text, flush=True)",
        "        print(text, flush=True)",
        _training("distributed", "attention_is_told_once[ddp]"),
    ),
    Mutation(
        "shards: what goes into a block is cast",
        PARALLEL,
        "reduce_dtype=torch.float32 if bf16 else None,\n            cast_forward_inputs=False,",
        "reduce_dtype=torch.float32 if bf16 else None,\n            cast_forward_inputs=True,",
        SHARDS,
    ),
    Mutation(
        "shards: what goes into the model is cast",
        PARALLEL,
        "whole = MixedPrecisionPolicy(cast_forward_inputs=False)",
        "whole = MixedPrecisionPolicy(param_dtype=travelling)",
        SHARDS,
    ),
    Mutation(
        "shards: gradients summed in bfloat16",
        PARALLEL,
        "reduce_dtype=torch.float32 if bf16 else None",
        "reduce_dtype=None",
        SHARDS,
    ),
)


def main(arguments: Sequence[str] | None = None) -> int:
    machinery.MUTATIONS = MUTATIONS
    machinery.PRELOADED += ("PIL.Image", "torch.distributed.checkpoint", "torch.distributed.fsdp")
    # What a run imports is its copy.
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    return machinery.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
