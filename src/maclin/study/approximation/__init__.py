"""Approximation: error and time of Macformer against length and number of features, kernel by kernel."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ...bench import environment
from ...core.errors import MaclinError, OptionError
from ...core.kernels import KERNELS
from ...core.mechanisms.macformer import ESTIMATORS
from ...progress import Progress, Silent, Steps
from ...records import SCHEMA_VERSION, Config, Study
from ..checks import check_increasing, check_known, check_positive
from ..journal import Journal
from .cells import Errors, Latencies, build_macformer
from .findings import findings_of
from .views import charts_of, heat_maps_of, tables_of

QUESTION = (
    "How far is Macformer's attention from the exact attention of its kernel, by length and number of features, and "
    "what time does it take, beside averaging the values, a first-order expansion and exact attention?"
)
DATA = ("aligned", "isotropic", "real")


@dataclass(frozen=True)
class ApproximationStudy:
    """Every kernel and estimator over lengths and numbers of features, beside exact, uniform, taylor, rfa and favor.

    q and k go through ppSBN's first half once (per token, unit norm), and every method is given the same; the truth is
    exact kernel attention on them, in float64, for ``num_rows`` queries spread over the sequence. Where an estimator
    fits itself to data, it is given other draws of the same problem.

    Args:
        lengths: tokens of q, k and v.
        features: numbers of features M, even.
        kernels: names of ``maclin.KERNELS``.
        estimators: of ``macformer``.
        data: "aligned", "isotropic" (see ``study.data``) or "real", which has 512 tokens whatever ``lengths`` says
            and takes another layer for each seed. Heat maps show the first.
        scales: of the logits; after ppSBN this is the largest |t|. 1/sqrt(D) is the published one.
        head_dim: D of the data that is drawn.
        num_rows: queries that are compared.
        num_seeds: draws of data and features.
        seconds_per_point: wall time for the latency of one method at one length.
        max_seconds_per_run: longest single run that is still started, going by the lengths before.

    Raises:
        OptionError: a setting is not valid; the message says what to pass instead.
    """

    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    features: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    kernels: tuple[str, ...] = tuple(KERNELS)
    estimators: tuple[str, ...] = ("published", "stratified")
    data: tuple[str, ...] = ("aligned", "isotropic")
    scales: tuple[float, ...] = (0.125, 0.5)
    head_dim: int = 64
    num_rows: int = 256
    num_seeds: int = 5
    seconds_per_point: float = 0.25
    max_seconds_per_run: float = 20.0

    def __post_init__(self) -> None:
        check_known("kernels", self.kernels, tuple(KERNELS))
        check_known("estimators", self.estimators, ESTIMATORS)
        check_known("data", self.data, DATA)
        check_increasing("lengths", self.lengths, 2)
        check_increasing("features", self.features, 2)
        if any(m % 2 for m in self.features):
            raise OptionError(f"wanted even features, since rfa takes them in pairs, got {list(self.features)}")
        if not self.scales or min(self.scales) <= 0 or len(set(self.scales)) < len(self.scales):
            raise OptionError(f"wanted positive scales, each once, got {list(self.scales)}")
        if self.head_dim < 4:
            raise OptionError(f"wanted a head_dim of at least 4, got {self.head_dim}")
        check_positive(self, ("num_rows", "num_seeds", "seconds_per_point", "max_seconds_per_run"))
        for kernel in self.kernels:
            for estimator in self.estimators:
                mech = build_macformer(kernel, estimator, 4 * self.head_dim, self.head_dim, 1, seed=0)
                for scale in self.scales:
                    try:
                        mech.features(scale)
                    except MaclinError as error:
                        raise OptionError(f"kernel {kernel!r} cannot take scale {scale:g}: {error}") from error

    @classmethod
    def quick(cls) -> ApproximationStudy:
        """Under a minute on one core."""
        return cls(
            lengths=(256, 1024, 4096),
            features=(32, 128, 512),
            data=("aligned",),
            num_seeds=2,
            seconds_per_point=0.05,
            max_seconds_per_run=2.0,
        )

    @classmethod
    def standard(cls) -> ApproximationStudy:
        """About eight minutes on one core."""
        return cls()

    @property
    def reference_length(self) -> int:
        """Length of the tables, and of charts over features: the longest of at most 4096."""
        return max([length for length in self.lengths if length <= 4096], default=self.lengths[0])

    @property
    def reference_features(self) -> int:
        """M of the tables, and of charts over lengths: 128, or the middle one."""
        return 128 if 128 in self.features else self.features[len(self.features) // 2]


def run(job: ApproximationStudy, journal: Journal | None = None, progress: Progress | None = None) -> Study:
    """Measure errors and latencies as ``job`` says.

    Args:
        job: settings.
        journal: holds what an interrupted run has measured; None keeps everything in memory.
        progress: is told of every cell.

    Returns:
        The study; ``maclin.report.write_study`` writes it.

    Raises:
        InputError: "real" data without the packaged model.
    """
    journal = Journal() if journal is None else journal
    steps = Steps(progress or Silent())
    errors, latencies = Errors(job), Latencies(job)
    keys = errors.cells()

    def text(key: Config) -> str:
        return f"{key['data']}, scale {key['scale']:g}, {key['length']} tokens, seed {key['seed']}"

    with steps.step("errors against exact kernel attention", len(keys)) as said:
        cells = journal.all_measured(keys, errors.measure, said, text)
    timed: list[Config] = []
    with steps.step("latencies beside fused softmax") as said:
        for key in latencies.cells():
            timed.append(journal.measured(key, lambda key=key: latencies.measure(key, timed, said.advance)))
    return Study(
        schema_version=SCHEMA_VERSION,
        name="approximation",
        question=QUESTION,
        findings=findings_of(job, cells, timed),
        settings=json.loads(json.dumps(dataclasses.asdict(job))),
        environment=environment(),
        measurements=(*cells, *timed),
        tables=tables_of(job, cells, timed),
        charts=charts_of(job, cells, timed),
        heat_maps=heat_maps_of(job, cells),
        warnings=tuple(dict.fromkeys(cell["reason"] for cell in cells if cell.get("reason"))),
        seconds=steps.seconds,
    )
