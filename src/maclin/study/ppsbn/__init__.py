"""ppSBN: what its two halves do to the error of Macformer's attention and to the stability of training."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ...bench import environment
from ...core.errors import OptionError
from ...core.features import DEGREE_LAWS
from ...core.mechanisms.macformer import ESTIMATORS
from ...progress import Progress, Silent, Steps
from ...records import SCHEMA_VERSION, Config, Study
from ..checks import check_increasing, check_known, check_positive
from ..data import Problem, RealProblems, aligned, isotropic, joined, real
from ..journal import Journal
from ..source_text import SourceTask, source_task
from .errors import errors
from .findings import findings_of
from .rows import Cells
from .training import training_run
from .variants import BASELINES, VARIANTS, Pre, build
from .views import charts_of, heat_maps_of, tables_of

QUESTION = "What does ppSBN do to the error of Macformer's attention, and to the stability of its training?"
DATA = ("aligned", "isotropic", "real")
"""What errors are measured on; "real" needs the packaged model."""

_HEADS, _SAMPLES = 4, 2  # of synthetic problems


@dataclass(frozen=True)
class PpsbnStudy:
    """ppSBN whole, without its first half, without its second, and without both, in error and in training.

    Errors are those of attention outputs with ``error_features`` features. Training is that of a small Transformer that
    says from which package of Python's standard library a stretch of source code is; see ``_ppsbn_task``.

    Args:
        estimators: of macformer; "published" is the paper's.
        data: what errors are measured on; see ``DATA``.
        radii: largest |q||k| / sqrt(D) of the synthetic data.
        error_features: M of the errors, at head width 32.
        num_draws: of the features, where they are drawn.
        layers: of the packaged model, for the real data.
        num_documents: of the real data, half of them to calibrate on.
        document_length: tokens of each, and of the synthetic data; at least 128.
        batch_sizes: of training, increasing.
        learning_rates: of training, increasing; the first is the calm one.
        num_seeds: training runs of each kind, with other weights, features and order of the examples.
        num_examples: seen in each run, whatever the batch size.
        num_held_out: examples to judge on, of other files.
        length: words of an example, at least 4.
        width: of the Transformer.
        num_heads: of its attention.
        num_layers: of it.
        num_features: M in training.

    Raises:
        OptionError: a setting is not valid; the message says what to pass instead.
    """

    estimators: tuple[str, ...] = ("published", "stratified")
    data: tuple[str, ...] = DATA
    radii: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    error_features: int = 128
    num_draws: int = 3
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    num_documents: int = 8
    document_length: int = 256
    batch_sizes: tuple[int, ...] = (2, 4, 16, 64)
    learning_rates: tuple[float, ...] = (3e-3, 2e-2)
    num_seeds: int = 3
    num_examples: int = 2048
    num_held_out: int = 600
    length: int = 64
    width: int = 32
    num_heads: int = 2
    num_layers: int = 1
    num_features: int = 64

    def __post_init__(self) -> None:
        check_known("estimators", self.estimators, ESTIMATORS)
        check_known("data", self.data, DATA)
        check_increasing("batch_sizes", self.batch_sizes, 1)
        _increasing("radii", self.radii)
        if not self.layers or min(self.layers) < 0 or len(set(self.layers)) < len(self.layers):
            raise OptionError(f"wanted layers counted from 0, each once, got {list(self.layers)}")
        _increasing("learning_rates", self.learning_rates)
        if self.batch_sizes[-1] > self.num_examples:
            raise OptionError(
                f"wanted batch_sizes of at most num_examples, {self.num_examples}, got {self.batch_sizes[-1]}"
            )
        if self.width < 1 or self.num_heads < 1 or self.width % self.num_heads:
            raise OptionError(f"wanted a width that num_heads divides, got {self.width} and {self.num_heads}")
        least = self.width // self.num_heads + 1
        if self.num_features < least or self.error_features < _ERROR_WIDTH + 1:
            raise OptionError(
                f"wanted num_features of at least {least} and error_features of at least {_ERROR_WIDTH + 1}, one more "
                f"than a head is wide, got {self.num_features} and {self.error_features}"
            )
        if self.length < 4:
            raise OptionError(f"wanted a length of at least 4 words, got {self.length}")
        least = _TOKENS_PER_AXIS * _ERROR_WIDTH
        if self.document_length < least:
            raise OptionError(
                f"wanted a document_length of at least {least} tokens, to calibrate on, got {self.document_length}"
            )
        check_positive(self, ("num_draws", "num_seeds", "num_held_out", "num_layers"))
        if self.num_documents < 2:
            raise OptionError(f"wanted num_documents of at least 2, got {self.num_documents}")

    @classmethod
    def quick(cls) -> PpsbnStudy:
        """About a minute on one core, without real data."""
        return cls(
            estimators=("published",),
            data=("aligned",),
            radii=(0.25, 1.0, 4.0),
            document_length=128,
            batch_sizes=(2, 8),
            num_seeds=2,
            num_examples=512,
            num_held_out=300,
        )

    @classmethod
    def standard(cls) -> PpsbnStudy:
        """About a quarter of an hour on two cores."""
        return cls()


_TOKENS_PER_AXIS = 4  # of a head, that a calibration needs
_ERROR_WIDTH = 32  # of the heads of the packaged model, and of the synthetic data beside it
_PRES: tuple[tuple[Pre, bool], ...] = (
    (False, False),
    ("token", False),
    ("token", True),
    ("batch", False),
    ("batch", True),
)


def run(job: PpsbnStudy, journal: Journal | None = None, progress: Progress | None = None) -> Study:
    """Measure errors and train, as ``job`` says.

    Args:
        job: settings.
        journal: holds what an interrupted run has measured; None keeps everything in memory.
        progress: is told of every figure.

    Returns:
        The study; ``maclin.report.write_study`` writes it.

    Raises:
        InputError: "real" data without the packaged model, or a Python without its source.
    """
    journal = Journal() if journal is None else journal
    steps = Steps(progress or Silent())
    problems = _Problems(job)
    keys = list(_error_keys(job))
    with steps.step("errors of the attention output", len(keys)) as said:
        cells = journal.all_measured(
            keys, lambda key: _error(job, key, problems), said, lambda key: f"{_where(key)}, {key['estimator']}"
        )
    task = source_task(job.length, job.num_examples, job.num_held_out)
    keys = list(_training_keys(job))

    def text(key: Config) -> str:
        return f"{key['variant']}, batch {key['batch_size']}, rate {key['learning_rate']:g}"

    with steps.step("training", len(keys)) as said:
        runs = journal.all_measured(keys, lambda key: _train(job, key, task), said, text)
    trained = Cells(runs, task.task.majority_accuracy)
    return Study(
        schema_version=SCHEMA_VERSION,
        name="ppsbn",
        question=QUESTION,
        findings=findings_of(job, cells, trained),
        settings=json.loads(json.dumps(dataclasses.asdict(job))),
        environment=environment("cpu", torch.float32),
        measurements=(*cells, *runs),
        tables=tables_of(job, cells, trained),
        charts=charts_of(job, cells, trained),
        heat_maps=heat_maps_of(job, trained),
        seconds=steps.seconds,
    )


def _increasing(option: str, given: Sequence[float]) -> None:
    if not given or min(given) <= 0 or list(given) != sorted(set(given)):
        raise OptionError(f"wanted positive, increasing {option}, got {list(given)}")


def _error_keys(job: PpsbnStudy) -> Iterator[Config]:
    for data in job.data:
        layers = [{"layer": layer} for layer in job.layers]
        places = layers if data == "real" else [{"radius": radius} for radius in job.radii]
        for place in places:
            for estimator in job.estimators:
                for pre, fits in _PRES:
                    yield {
                        "part": "errors",
                        "data": data,
                        **place,
                        "estimator": estimator,
                        "pre": pre,
                        "fits_temperature": fits,
                    }


def _training_keys(job: PpsbnStudy) -> Iterator[Config]:
    subjects: list[tuple[str, str | None]] = [(name, None) for name in BASELINES]
    subjects += [(variant.name, estimator) for estimator in job.estimators for variant in VARIANTS]
    for seed in range(job.num_seeds):
        for lr in job.learning_rates:
            for batch_size in job.batch_sizes:
                for name, estimator in subjects:
                    yield {
                        "part": "training",
                        "variant": name,
                        "estimator": estimator,
                        "learning_rate": lr,
                        "batch_size": batch_size,
                        "seed": seed,
                    }


class _Problems:
    """Pairs of data to judge and to calibrate on; the packaged model is loaded only where a figure needs it."""

    def __init__(self, job: PpsbnStudy) -> None:
        self._job = job

    @cached_property
    def _real(self) -> RealProblems:
        job = self._job
        return real(sorted(job.layers), num_documents=job.num_documents, length=job.document_length)

    def of(self, key: Config) -> tuple[Problem, Problem]:
        """To judge, to calibrate."""
        if key["data"] == "real":
            index = sorted(self._job.layers).index(key["layer"])
            return self._real.held_out[index], self._real.calibration[index]
        return self._synthetic(key, 0), self._synthetic(key, _SAMPLES)

    def _synthetic(self, key: Config, first: int) -> Problem:
        make = aligned if key["data"] == "aligned" else isotropic
        sizes = {"radius": key["radius"], "head_dim": _ERROR_WIDTH, "num_heads": _HEADS}
        drawn = [make(self._job.document_length, **sizes, draw=draw) for draw in range(first, first + _SAMPLES)]
        return joined(drawn)


def _error(job: PpsbnStudy, key: Config, problems: _Problems) -> Config:
    judged, calibration = problems.of(key)
    seeds = range(job.num_draws if key["estimator"] in DEGREE_LAWS else 1)  # the others draw nothing
    return errors(key["pre"], key["fits_temperature"], key["estimator"], job.error_features, judged, calibration, seeds)


def _train(job: PpsbnStudy, key: Config, task: SourceTask) -> Config:
    head_dim = job.width // job.num_heads
    return training_run(
        task,
        lambda layer: build(key["variant"], key["estimator"], head_dim, job.num_heads, job.num_features),
        width=job.width,
        num_heads=job.num_heads,
        num_layers=job.num_layers,
        num_examples=job.num_examples,
        batch_size=key["batch_size"],
        lr=key["learning_rate"],
        seed=key["seed"],
    )


def _where(key: Config) -> str:
    return f"layer {key['layer']}" if key["data"] == "real" else f"{key['data']}, radius {key['radius']:g}"
