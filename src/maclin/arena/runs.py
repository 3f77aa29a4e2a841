"""``maclin arena run``: every mechanism on one task, from the same seeds, data and recipe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .._version import __version__
from ..bench import environment
from ..bench.specs import Spec
from ..core.errors import CapabilityError, InputError, OptionError
from ..nn.model import MacformerModel
from ..progress import Progress, Silent
from ..records import ArenaRun, ArenaTask, ArenaTaskResult, Config
from ..training.checkpoint import check_same
from ..training.machine import accelerator_for
from . import tasks
from .cost_runs import BATCH_SIZE, measured_costs
from .models import build_model, calibrated_, objective_of, test_scores
from .objective import Objective, watched
from .results import (
    COSTS_NAME,
    MODEL_NAME,
    RESULT_NAME,
    TASK_NAME,
    CostsFile,
    TaskFile,
    load_task,
    read_record,
    write_record,
)
from .schedule import Order
from .settings import ModelSettings, Recipe, TrainSettings, recipe
from .specs import check_spec, config_of, folder_of, specs_of, task_label
from .task import Splits, Task
from .train import LAST_NAME, Training, TrainingError, train

if TYPE_CHECKING:
    from accelerate import Accelerator

_DATA_SEED = 0  # of what is generated and held out; the same for every training


@dataclass(frozen=True)
class ArenaJob:
    """What to run.

    Args:
        task: name in the registry.
        out: directory of all results; that of the task is made in it.
        mechanisms: names and options, as ``softmax,macformer:num_features=64``.
        kernels: for mechanisms that have one and are not told which.
        baselines: whether softmax, mean and window are run as well.
        preset: "quick", "standard" or "paper".
        num_seeds: trainings of each mechanism, with other weights, features and order of the examples.
        options: of the task.
        data_dir: where the user has the published data.
        train: changes to the training of the recipe, by field; see ``TrainSettings``.
        model: changes to the model of the recipe, by field; see ``ModelSettings``.
        device: "auto", "cpu" or "cuda".
        resume: go on with what an interrupted call has left, and keep what it has finished.
        force: drop earlier results of the same mechanisms and seeds.
        costs: whether the cost of a training step is measured afterwards.
        tensorboard: also write TensorBoard's files.

    Raises:
        OptionError: an unknown name, or a value that cannot be.
    """

    task: str
    out: Path
    mechanisms: str = "macformer"
    kernels: tuple[str, ...] = ()
    baselines: bool = True
    preset: str = "quick"
    num_seeds: int = 3
    options: Config = field(default_factory=dict)
    data_dir: Path | None = None
    train: Config = field(default_factory=dict)
    model: Config = field(default_factory=dict)
    device: str = "auto"
    resume: bool = False
    force: bool = False
    costs: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise OptionError(f"wanted at least one seed, got {self.num_seeds}")
        if self.resume and self.force:
            raise OptionError("--resume goes on with earlier results and --force drops them; pass one of them")
        for spec in self.specs:
            check_spec(spec, self.recipe.model)

    @property
    def specs(self) -> tuple[Spec, ...]:
        """The mechanisms, baselines first."""
        return specs_of(self.mechanisms, self.kernels, self.baselines)

    @property
    def recipe(self) -> Recipe:
        """That of the task, with the changes."""
        found = recipe(self.task, self.preset)
        for given, cls in ((self.train, TrainSettings), (self.model, ModelSettings)):
            wrong = [name for name in given if name not in cls.__dataclass_fields__]
            if wrong:
                raise OptionError(f"no setting {wrong[0]!r}; known are {', '.join(cls.__dataclass_fields__)}")
        # how often is looked follows the number of steps
        train = {"evaluate_every": None, **self.train} if "steps" in self.train else self.train
        return Recipe(replace(found.model, **self.model), replace(found.train, **train))

    @property
    def folder(self) -> Path:
        """Of the task's results."""
        return self.out / folder_of(f"{self.label}-{self.preset}")

    @property
    def label(self) -> str:
        """What the task is called in the results."""
        return task_label(self.task, self.options)


def run(job: ArenaJob, progress: Progress | None = None) -> ArenaTaskResult:
    """Train every mechanism from every seed, judge it, and measure what a step costs.

    Args:
        job: what to run.
        progress: is told of every step.

    Returns:
        Everything that lies in the directory of the task, earlier runs with the same settings included.

    Raises:
        OptionError: settings that cannot be, or results of other settings in the directory.
        FileExistsError: results of the same runs are there, and neither ``resume`` nor ``force`` is set.
        InputError: the data cannot be had.
        KeyboardInterrupt: Ctrl-C; ``resume`` goes on from there.
    """
    accelerator = accelerator_for(job.recipe.train.precision, job.device)
    is_main = accelerator.is_main_process
    progress = progress if progress is not None and is_main else Silent()
    task = tasks.task(job.task, **job.options)
    sizes = task.preset(job.preset)
    if is_main:
        _check_folder(job)
    with accelerator.main_process_first():  # one fetches or generates, the others find it in the cache
        splits = task.load(job.preset, _DATA_SEED, job.data_dir, progress)
    if is_main:
        full = max(splits.length, task.preset("standard").length if job.preset == "quick" else sizes.length)
        write_record(job.folder / TASK_NAME, TaskFile(_described(job, task, splits, full), _settings(job)))
    accelerator.wait_for_everyone()
    for spec, seed in _cells(job):
        folder = _cell(job, spec, seed)
        if not (folder / RESULT_NAME).exists():
            _run_one(job, task, splits, spec, seed, accelerator, progress)
    if job.costs and is_main:
        _measure_costs(job, task, accelerator.device, progress)
    accelerator.wait_for_everyone()
    return load_task(job.folder)


def run_costs(
    job: ArenaJob,
    lengths: tuple[int, ...] = (),
    *,
    batch_size: int = BATCH_SIZE,
    seconds_per_model: float = 2.0,
    progress: Progress | None = None,
) -> ArenaTaskResult:
    """Measure what a training step of each mechanism takes; trains nothing, writes nothing, needs no data.

    Args:
        job: task, mechanisms, sizes, precision and device.
        lengths: of the sequences; none is that of the preset.
        batch_size: sequences of a step.
        seconds_per_model: wall time for the runs of one mechanism at one length.
        progress: is told of every length.

    Returns:
        The costs, without any runs.

    Raises:
        OptionError: settings that cannot be.
    """
    task = tasks.task(job.task, **job.options)
    full = task.preset(job.preset).length
    device = accelerator_for(job.recipe.train.precision, job.device).device
    costs = measured_costs(
        task,
        job.specs,
        job.recipe,
        lengths or (full,),
        device,
        batch_size=batch_size,
        seconds_per_model=seconds_per_model,
        progress=progress,
    )
    head = ArenaTask(
        job.label, job.preset, task.metric, watched(task), task.higher_is_better, full, full, 0, 0, 0, "", 0.0
    )
    return ArenaTaskResult(head, _shared(job), (), costs)


def _cells(job: ArenaJob) -> Iterator[tuple[Spec, int]]:
    """Seed by seed, so that a table of all mechanisms is there as early as can be."""
    for seed in range(job.num_seeds):
        for spec in job.specs:
            yield spec, seed


def _cell(job: ArenaJob, spec: Spec, seed: int) -> Path:
    return job.folder / folder_of(spec.text) / f"seed-{seed}"


def _settings(job: ArenaJob) -> Config:
    """What all runs of a directory share, and which mechanisms there are, in the order of the tables."""
    path = job.folder / TASK_NAME
    earlier = read_record(TaskFile, path).settings.get("mechanisms", []) if path.exists() else []
    labels = [spec.text for spec in job.specs]
    return {**_shared(job), "mechanisms": [*earlier, *(label for label in labels if label not in earlier)]}


def _shared(job: ArenaJob) -> Config:
    found = job.recipe
    shared = {
        "maclin_version": __version__,
        "options": job.options,
        "data_dir": None if job.data_dir is None else str(job.data_dir),
        "model": asdict(found.model),
        "train": asdict(found.train),
    }
    return json.loads(json.dumps(shared, default=str))


def _check_folder(job: ArenaJob) -> None:
    """Refuse results of other settings and results that would be replaced; drop what ``force`` lets go."""
    path = job.folder / TASK_NAME
    if path.exists() and job.force:
        theirs = {**read_record(TaskFile, path).settings}
        theirs.pop("mechanisms", None)
        if theirs != _shared(job):
            shutil.rmtree(job.folder)
    elif path.exists():
        theirs = {**read_record(TaskFile, path).settings}
        theirs.pop("mechanisms", None)
        check_same(theirs, _shared(job), path)
    cells = [_cell(job, spec, seed) for spec, seed in _cells(job)]
    if job.force:
        for cell in cells:
            shutil.rmtree(cell, ignore_errors=True)
    there = [cell for cell in cells if (cell / RESULT_NAME).exists() or (cell / LAST_NAME).exists()]
    if there and not job.resume:
        raise FileExistsError(
            f"{job.folder} already holds {len(there)} of these {len(cells)} runs, {there[0].parent.name} among them; "
            "pass --resume to keep what is finished and go on with the rest, or --force to begin again"
        )


def _described(job: ArenaJob, task: Task, splits: Splits, full_length: int) -> ArenaTask:
    trivial = task.trivial(splits)
    return ArenaTask(
        name=job.label,
        preset=job.preset,
        metric=task.metric,
        watched=watched(task),
        higher_is_better=task.higher_is_better,
        length=splits.length,
        full_length=full_length,
        num_train=len(splits.train),
        num_valid=len(splits.valid),
        num_test=len(splits.test),
        trivial_name=trivial.name,
        trivial_score=trivial.value,
        notes=splits.notes,
    )


def _run_one(
    job: ArenaJob, task: Task, splits: Splits, spec: Spec, seed: int, accelerator: Accelerator, progress: Progress
) -> None:
    folder, found = _cell(job, spec, seed), job.recipe
    identity = {"task": task.name, "preset": job.preset, "mechanism": spec.text, "seed": seed, **_shared(job)}
    row = ArenaRun(
        label=spec.text,
        mechanism=spec.name,
        config=config_of(spec),
        seed=seed,
        environment=environment(accelerator.device, _DTYPES[found.train.precision]),
    )
    interrupted = False
    try:
        model = build_model(task, spec, found.model, splits.length, seed)
        objective = objective_of(task)
        if found.train.calibrate:  # a training that goes on does it again, and finds the same
            _calibrate(model, objective, splits, found.train, seed)
        name = f"{job.label}, {spec.text}, seed {seed}"
        training = Training(model, objective, splits, found.train, seed, folder, identity, name)
        done = train(training, accelerator, resume=job.resume, progress=progress, tensorboard=job.tensorboard)
        interrupted = done.interrupted
        scores = test_scores(task, model, splits.test, done.test_loss, done.test_accuracy, found.train.batch_size)
        row = replace(
            row,
            score=scores[task.metric],
            scores=scores,
            best_step=done.best_step,
            num_steps=found.train.steps,
            num_skipped_steps=done.num_skipped_steps,
            num_parameters=sum(p.numel() for p in model.parameters()),
            seconds=done.seconds,
            tokens_per_second=done.tokens_per_second,
            looks=done.looks,
            resumed_at_steps=done.resumed_at_steps,
        )
        if accelerator.is_main_process:
            model.save_pretrained(folder / MODEL_NAME)
    except (CapabilityError, TrainingError) as error:
        row = replace(row, reason=str(error))
    except (MemoryError, torch.OutOfMemoryError):
        row = replace(row, reason="out of memory; a smaller --batch-size or --accumulation takes less")
    if accelerator.is_main_process:
        write_record(folder / RESULT_NAME, row)
        for path in (folder / LAST_NAME, *folder.glob("best-*.pt")):
            path.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    if interrupted:
        raise KeyboardInterrupt


def _calibrate(model: MacformerModel, objective: Objective, splits: Splits, train: TrainSettings, seed: int) -> None:
    """On the batch of the first step, as much of it as is used."""
    first = Order(len(splits.train), train.batch_size, seed).batch(0)[:_CALIBRATED_ON]
    try:
        calibrated_(model, objective.collate([splits.train[i] for i in first]))
    except InputError as error:
        raise TrainingError(f"{error}. Pass --no-calibrate to train it as it is built") from error


_CALIBRATED_ON = 16  # sequences
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _measure_costs(job: ArenaJob, task: Task, device: torch.device, progress: Progress) -> None:
    """Of every mechanism in the directory, at the length that was trained and at the full one."""
    head = read_record(TaskFile, job.folder / TASK_NAME)
    specs = [spec for label in head.settings["mechanisms"] for spec in specs_of(label, baselines=False)]
    lengths = sorted({head.task.length, head.task.full_length})
    costs = measured_costs(task, specs, job.recipe, lengths, device, progress=progress)
    write_record(job.folder / COSTS_NAME, CostsFile(costs))
