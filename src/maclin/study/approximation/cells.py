"""What the approximation study measures: errors of all methods on one draw, latencies of all methods at one length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...bench import free_bytes
from ...core.errors import OptionError
from ...core.features import DEGREE_LAWS
from ...core.kernels import KERNELS
from ...core.mechanisms import Mechanism, mechanism
from ...core.mechanisms.base import calibrate
from ...core.mechanisms.macformer import Macformer
from ...core.reference import kernel_attention
from ...records import Config
from ..data import Problem, RealProblems, aligned, isotropic, joined, real
from ..latencies import EXACT, latencies

if TYPE_CHECKING:
    from . import ApproximationStudy

REAL_LENGTH = 512
UNIFORM, TAYLOR = "uniform", "taylor"
_FIXED = (*DEGREE_LAWS, "taylor")  # estimators with nothing to fit
_CALIBRATION_DRAWS, _CALIBRATION_LENGTH = 4, 512
_ORACLE_COPIES = 6  # float64 matrices of rows x keys that exist at once in the oracle


def macformer_name(estimator: str) -> str:
    """What a Macformer estimator is called in tables and charts."""
    return f"macformer {estimator}"


def subject_name(method: str, num_features: int) -> str:
    """What a method with so many features is called in a cell of latencies; 0 where there is no choice."""
    return f"{method}, {num_features} features" if num_features else method


def build_macformer(
    kernel: str, estimator: str, num_features: int, head_dim: int, num_heads: int, seed: int
) -> Macformer:
    """A Macformer with ppSBN per token; raises OptionError where it needs more features."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"kernel": kernel, "estimator": estimator, "num_features": num_features}
    return Macformer(head_dim, num_heads, **options, ppsbn="token", generator=generator).eval()


class Errors:
    """Normalised mean-square errors, one cell for each kind of data, scale, length and seed."""

    def __init__(self, job: ApproximationStudy) -> None:
        self.job = job
        self._real: RealProblems | None = None
        self._built: dict[tuple[object, ...], Mechanism | str] = {}

    def cells(self) -> list[Config]:
        """The cells to measure."""
        job = self.job
        common = {
            "part": "error",
            "kernels": list(job.kernels),
            "estimators": list(job.estimators),
            "features": list(job.features),
            "head_dim": job.head_dim,
            "num_rows": job.num_rows,
        }
        return [
            {**common, "data": data, "scale": scale, "seed": seed, "length": length}
            for data in job.data
            for scale in job.scales
            for seed in range(job.num_seeds)
            for length in ((REAL_LENGTH,) if data == "real" else job.lengths)
        ]

    @torch.no_grad()
    def measure(self, key: Config) -> Config:
        """``errors``: rows of kernel, method, num_features (0 where there is nothing to choose), nmse or reason."""
        data, scale, seed, length = key["data"], key["scale"], key["seed"], key["length"]
        needed = 8 * _ORACLE_COPIES * self.job.num_rows * length
        free = free_bytes()
        if free is not None and needed > 0.8 * free:
            return {"errors": [], "reason": f"{length} tokens left out: the exact rows alone need {needed} bytes"}
        whole = self._problem(data, length, seed).standardised(scale)
        problem = whole.rows(self.job.num_rows)
        rows: list[Config] = []
        for kernel in self.job.kernels:
            exact = kernel_attention(problem.q, problem.k, problem.v, KERNELS[kernel], scale=scale)
            for method, num_features, made in self._methods(kernel, problem, key):
                row: Config = {"kernel": kernel, "method": method, "num_features": num_features}
                if isinstance(made, str):
                    rows.append({**row, "nmse": None, "reason": made})
                    continue
                out = made(problem.q, problem.k, problem.v, scale=scale)
                rows.append({**row, "nmse": _nmse(out, exact)})
        return {"errors": rows}

    def _methods(self, kernel: str, problem: Problem, key: Config) -> Iterator[tuple[str, int, Mechanism | str]]:
        """Method, number of features, and the mechanism or why there is none."""
        d, h, seed = problem.head_dim, problem.num_heads, key["seed"]
        yield UNIFORM, 0, mechanism("mean", head_dim=d, num_heads=h)
        yield TAYLOR, 0, mechanism("taylor", head_dim=d, num_heads=h, kernel=kernel)
        yield EXACT, 0, mechanism("softmax", head_dim=d, num_heads=h)
        for m in self.job.features:
            for estimator in self.job.estimators:
                yield macformer_name(estimator), m, self._macformer(kernel, estimator, m, problem, key)
            if kernel == "exp":  # neither has another kernel
                for name in ("rfa", "favor"):
                    generator = torch.Generator().manual_seed(seed)
                    yield name, m, mechanism(name, head_dim=d, num_heads=h, num_features=m, generator=generator)

    def _macformer(
        self, kernel: str, estimator: str, num_features: int, problem: Problem, key: Config
    ) -> Mechanism | str:
        """Built and, where there is something to fit, fitted once for all lengths of a draw."""
        data, scale, seed = key["data"], key["scale"], key["seed"]
        name = (kernel, estimator, num_features, data, scale, seed)
        if name not in self._built:
            try:
                made = build_macformer(kernel, estimator, num_features, problem.head_dim, problem.num_heads, seed)
            except OptionError as error:
                self._built[name] = str(error)
                return str(error)
            if estimator not in _FIXED:
                other = self._calibration(data, seed).standardised(scale)
                made = calibrate(made, other.q, other.k, other.v, scale=scale)
            self._built[name] = made
        return self._built[name]

    def _problem(self, data: str, length: int, seed: int) -> Problem:
        if data == "real":
            held_out = self._layers().held_out
            return held_out[seed % len(held_out)]
        return self._drawn(data, length, problem=seed, draw=seed)

    def _calibration(self, data: str, seed: int) -> Problem:
        """Other draws of the same problem, several sequences of it."""
        if data == "real":
            calibration = self._layers().calibration
            return calibration[seed % len(calibration)]
        first = 10**6 + _CALIBRATION_DRAWS * seed
        draws = range(first, first + _CALIBRATION_DRAWS)
        return joined([self._drawn(data, _CALIBRATION_LENGTH, problem=seed, draw=draw) for draw in draws])

    def _drawn(self, data: str, length: int, problem: int, draw: int) -> Problem:
        if data == "aligned":
            return aligned(length, head_dim=self.job.head_dim, problem=problem, draw=draw)
        return isotropic(length, head_dim=self.job.head_dim, draw=draw)

    def _layers(self) -> RealProblems:
        if self._real is None:
            self._real = real(length=REAL_LENGTH)
        return self._real


class Latencies:
    """Latency and memory of every method for the kernel exp at the published scale, one cell for each length."""

    def __init__(self, job: ApproximationStudy) -> None:
        self.job = job
        self._subjects: dict[str, Mechanism] = {}

    def cells(self) -> list[Config]:
        """The cells to measure, ascending."""
        job = self.job
        common = {
            "part": "time",
            "estimators": list(job.estimators),
            "features": list(job.features),
            "head_dim": job.head_dim,
            "seconds_per_point": job.seconds_per_point,
            "max_seconds_per_run": job.max_seconds_per_run,
        }
        return [{**common, "length": length} for length in job.lengths]

    def measure(self, key: Config, before: Sequence[Config], say: Callable[[str], None]) -> Config:
        """As ``_latencies.latencies``; ``before`` are the cells of shorter lengths."""
        return latencies(
            self._all(),
            key["length"],
            before,
            seconds_per_point=self.job.seconds_per_point,
            max_seconds_per_run=self.job.max_seconds_per_run,
            say=say,
        )

    def _all(self) -> dict[str, Mechanism]:
        if not self._subjects:
            d = self.job.head_dim
            self._subjects = {
                UNIFORM: mechanism("mean", head_dim=d, num_heads=1),
                TAYLOR: mechanism("taylor", head_dim=d, num_heads=1),
            }
            for m in self.job.features:
                for estimator in self.job.estimators:
                    mech = self._macformer(estimator, m)
                    if mech is not None:
                        self._subjects[subject_name(macformer_name(estimator), m)] = mech
                for name in ("rfa", "favor"):
                    generator = torch.Generator().manual_seed(0)
                    mech = mechanism(name, head_dim=d, num_heads=1, num_features=m, generator=generator)
                    self._subjects[subject_name(name, m)] = mech
        return self._subjects

    def _macformer(self, estimator: str, num_features: int) -> Mechanism | None:
        try:
            made = build_macformer("exp", estimator, num_features, self.job.head_dim, 1, seed=0)
        except OptionError:
            return None
        if estimator in _FIXED:
            return made
        draws = range(_CALIBRATION_DRAWS)
        data = joined([aligned(_CALIBRATION_LENGTH, head_dim=self.job.head_dim, draw=draw) for draw in draws])
        return calibrate(made, data.q, data.k, data.v)


def _nmse(out: Tensor, exact: Tensor) -> float:
    """||out - exact||_F^2 / ||exact||_F^2."""
    return ((out.double() - exact).square().sum() / exact.square().sum()).item()
