"""Theory: the closed forms for random Maclaurin features, held against simulation; one bound, against quantiles."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ...bench import environment
from ...core.errors import OptionError
from ...core.kernels import KERNELS
from ...progress import Progress, Silent, Steps
from ...records import SCHEMA_VERSION, Config, Study
from ..checks import check_increasing, check_known
from ..journal import Journal
from .draws import MAX_DEGREE, kernel_estimates, pair_of, sketch_errors
from .findings import found
from .rows import QUANTILES, degree_rows, kernel_rows
from .variance import LAWS, SKETCHES, Pair, kernel_value

QUESTION = (
    "Do the closed forms predict the error of random Maclaurin features, and does the concentration bound say anything "
    "at the numbers of features in use?"
)


@dataclass(frozen=True)
class TheoryStudy:
    """Closed forms beside simulation, for pairs of vectors of given width, radius |x||y| and cosine.

    The random features of <x, y>^n are drawn by every sketch for n = 1 to ``max_degree``; those of whole kernels by
    ``core.features``, as ``macformer`` does. Every figure of a simulation comes with its standard error over seeds.

    Args:
        head_dim: D, the width of x and y; a power of two for the sketch srht.
        max_degree: the highest degree n of <x, y>^n.
        sketches: how directions are drawn; see ``_variance.SKETCHES``.
        kernels: names of ``maclin.KERNELS``; trigh is the same function as exp.
        laws: of the degrees; "published" and "kar_karnick".
        features: numbers of random features M of a kernel, increasing.
        radii: |x||y|; 1/sqrt(D) is what ppSBN leaves.
        cosines: of the angle between x and y, one pair each.
        num_draws: independent estimates for each figure and seed.
        num_seeds: repetitions with new draws.

    Raises:
        OptionError: a setting is not valid; the message says what to pass instead.
    """

    head_dim: int = 64
    max_degree: int = 6
    sketches: tuple[str, ...] = tuple(SKETCHES)
    kernels: tuple[str, ...] = ("exp", "inv", "log", "sqrt")
    laws: tuple[str, ...] = LAWS
    features: tuple[int, ...] = (32, 128, 512, 2048)
    radii: tuple[float, ...] = (0.125, 0.5, 1.0, 2.0)
    cosines: tuple[float, ...] = (0.9, 0.2)
    num_draws: int = 512
    num_seeds: int = 12

    def __post_init__(self) -> None:
        check_known("sketches", self.sketches, SKETCHES)
        check_known("kernels", self.kernels, KERNELS)
        check_known("laws", self.laws, LAWS)
        if self.head_dim < 4 or self.head_dim % 2:
            raise OptionError(f"wanted an even head_dim of at least 4, got {self.head_dim}")
        if "srht" in self.sketches and self.head_dim & (self.head_dim - 1):
            raise OptionError(f"wanted a power of two as head_dim, which sketch srht needs, got {self.head_dim}")
        if self.max_degree < 1:
            raise OptionError(f"wanted a max_degree of at least 1, got {self.max_degree}")
        check_increasing("features", self.features, 4)
        if len(self.features) < 2:
            raise OptionError(f"wanted two or more features, for a slope, got {list(self.features)}")
        if not self.radii or min(self.radii) <= 0 or len(set(self.radii)) < len(self.radii):
            raise OptionError(f"wanted positive radii, each once, got {list(self.radii)}")
        if not self.cosines or max(map(abs, self.cosines)) >= 1 or len(set(self.cosines)) < len(self.cosines):
            raise OptionError(f"wanted cosines between -1 and 1, each once, got {list(self.cosines)}")
        nearest = min(self.radii) * min(map(abs, self.cosines))
        if nearest >= max(KERNELS[name].radius for name in self.kernels):
            raise OptionError(
                f"wanted radii at which a kernel is defined, got a smallest |t| of {nearest:g}; pass smaller"
            )
        if self.num_draws < 2 or self.num_seeds < 2:
            raise OptionError(
                f"wanted at least 2 draws and 2 seeds, for a standard error, got {self.num_draws} and {self.num_seeds}"
            )

    @classmethod
    def quick(cls) -> TheoryStudy:
        """About ten seconds on one core."""
        return cls(head_dim=16, features=(32, 128, 512), num_draws=256, num_seeds=12)

    @classmethod
    def standard(cls) -> TheoryStudy:
        """About four minutes on one core."""
        return cls()

    @property
    def sketch_features(self) -> tuple[int, ...]:
        """Numbers of features of the sketches: D/2, D, 2 D, 8 D; srht is drawn in blocks of D."""
        d = self.head_dim
        return (d // 2, d, 2 * d, 8 * d)


def run(job: TheoryStudy, journal: Journal | None = None, progress: Progress | None = None) -> Study:
    """Simulate what ``job`` says, and set it beside the closed forms.

    Args:
        job: settings.
        journal: holds what an interrupted run has measured; None keeps everything in memory.
        progress: is told of every figure.

    Returns:
        The study; ``maclin.report.write_study`` writes it.
    """
    journal = Journal() if journal is None else journal
    steps = Steps(progress or Silent())
    pairs = _pairs(job)
    seeds = range(job.num_seeds)
    keys = [
        _key(job, "degree", sketch=sketch, num_features=m, seed=i, max_degree=job.max_degree)
        for m in job.sketch_features
        for sketch in job.sketches
        for i in seeds
    ]
    with steps.step("simulate features of one degree", len(keys)) as said:
        cells = journal.all_measured(
            keys,
            lambda key: _measure_sketch(job, key, pairs),
            said,
            lambda key: f"{key['sketch']}, {key['num_features']} features",
        )
    lists = {"kernels": list(job.kernels), "radii": list(job.radii)}
    keys = [
        _key(job, "kernel", law=law, num_features=m, seed=i, **lists)
        for m in job.features
        for law in job.laws
        for i in seeds
    ]
    with steps.step("simulate features of kernels", len(keys)) as said:
        cells += journal.all_measured(
            keys,
            lambda key: _measure_kernels(job, key, pairs),
            said,
            lambda key: f"{key['law']}, {key['num_features']} features",
        )
    with steps.step("set beside the closed forms"):
        moments = {cosine: Pair.of(*pair) for cosine, pair in zip(job.cosines, pairs, strict=True)}
        degrees = degree_rows(cells, moments, job.head_dim)
        parts = found(job, moments, degrees, kernel_rows(cells, moments, job.num_draws))
    return Study(
        schema_version=SCHEMA_VERSION,
        name="theory",
        question=QUESTION,
        findings=parts.findings,
        settings=json.loads(json.dumps(dataclasses.asdict(job))),
        environment=environment("cpu", torch.float64),
        measurements=tuple(cells),
        tables=parts.tables,
        charts=parts.charts,
        heat_maps=parts.heat_maps,
        warnings=parts.warnings,
        seconds=steps.seconds,
    )


def _pairs(job: TheoryStudy) -> Tensor:
    """Unit vectors x and y of every cosine. Shape: (cosines, 2, D)."""
    generator = torch.Generator().manual_seed(job.head_dim)
    return torch.stack([torch.stack(pair_of(cosine, job.head_dim, generator)) for cosine in job.cosines])


def _key(job: TheoryStudy, part: str, **values: object) -> Config:
    common = {"part": part, "head_dim": job.head_dim, "cosines": list(job.cosines), "num_draws": job.num_draws}
    return {**common, **values}


def _generator(key: Config) -> torch.Generator:
    """Of the draws of one figure, so that a resumed study gives the same ones."""
    return torch.Generator().manual_seed(zlib.crc32(json.dumps(key, sort_keys=True).encode()))


def _measure_sketch(job: TheoryStudy, key: Config, pairs: Tensor) -> Config:
    bias, square = sketch_errors(
        key["sketch"], pairs, job.max_degree, key["num_features"], job.num_draws, _generator(key)
    )
    return {
        "errors": [
            {"cosine": cosine, "degree": n + 1, "bias": float(bias[p, n]), "mean_square_error": float(square[p, n])}
            for p, cosine in enumerate(job.cosines)
            for n in range(job.max_degree)
        ]
    }


def _measure_kernels(job: TheoryStudy, key: Config, pairs: Tensor) -> Config:
    series = [(name, radius) for name in job.kernels for radius in job.radii]
    powers = range(MAX_DEGREE + 1)
    coefficients = torch.tensor(
        [[KERNELS[name].coefficient(n) * radius**n for name, radius in series] for n in powers], dtype=torch.float64
    )
    estimates = kernel_estimates(key["law"], coefficients, pairs, key["num_features"], job.num_draws, _generator(key))
    rows = []
    for p, cosine in enumerate(job.cosines):
        for column, (name, radius) in enumerate(series):
            t = radius * float(pairs[p, 0] @ pairs[p, 1])
            if abs(t) >= KERNELS[name].radius:
                continue  # f(t) is not defined
            errors = estimates[p, :, column] - kernel_value(KERNELS[name], t)
            quantiles = errors.abs().quantile(torch.tensor(QUANTILES, dtype=errors.dtype))
            rows.append(
                {
                    "kernel": name,
                    "radius": radius,
                    "cosine": cosine,
                    "bias": float(errors.mean()),
                    "mean_square_error": float(errors.square().mean()),
                    "quantiles": [float(value) for value in quantiles],
                }
            )
    return {"errors": [row for row in rows if math.isfinite(row["mean_square_error"])]}
