"""Projection: error, time and trained accuracy of Linformer against k, and the spectrum of real attention."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from ...bench import environment
from ...core.errors import OptionError
from ...core.mechanisms.linformer import PROJECTIONS, SHARINGS
from ...progress import Progress, Silent, Steps
from ...records import SCHEMA_VERSION, Config, Study
from ..checks import check_increasing, check_known, check_positive
from ..journal import Journal
from .cells import ProjectionLatencies, RealAttention
from .charts import charts_of, heat_maps_of
from .findings import findings_of
from .trained import Trained
from .views import Measurements, tables_of

QUESTION = (
    "How many slots k does Linformer need, in error on real attention, in time and in accuracy after training, and "
    "what do mechanisms without a k reach?"
)


@dataclass(frozen=True)
class ProjectionStudy:
    """Linformer's modes over k, beside uniform, Efficient Attention and revisited_linformer, which have no k.

    Error and spectrum are those of the layers of the packaged all-MiniLM-L6-v2, on held-out documents. Pooled modes
    need no fitting. Learned ones are fitted to each layer's exact output on calibration documents, starting from mean
    pooling, and judged on the held-out ones; they are also trained from the paper's random start inside a tiny
    Transformer that tells the packages of the standard library apart by bytes of their source.

    Args:
        proj_lens: k; on real data those up to ``length``, for latencies those up to the length.
        projections: modes of ``linformer``.
        sharings: of the learned mode.
        layers: of the model, counted from 0.
        num_documents: of at least ``length`` tokens, half of them for calibration.
        length: tokens of each document, at most 512.
        spectrum_documents: held-out documents whose attention matrices are taken apart.
        fitted_lens: those of ``proj_lens`` for which learned projections are fitted.
        fit_steps: of the optimiser, two documents each.
        time_lengths: tokens at which latencies are measured.
        num_heads: H of latencies.
        head_dim: D of latencies.
        seconds_per_point: wall time for the latency of one mode and k at one length.
        max_seconds_per_run: longest single run that is still started, going by the lengths before.
        trained_lens: k of the trained models, up to ``task_length``.
        sharing_len: the k of ``trained_lens`` at which all sharing and pooling modes are trained.
        task_length: bytes of an example.
        num_train: examples to train on.
        num_held_out: examples to judge on, from other files.
        num_layers: of the trained models; with one, sharing "layerwise" is "key-value" and not run.
        steps: of the optimiser, 32 examples each.
        num_seeds: trained models of each kind.

    Raises:
        OptionError: a setting is not valid; the message says what to pass instead.
    """

    proj_lens: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    projections: tuple[str, ...] = PROJECTIONS
    sharings: tuple[str, ...] = SHARINGS
    layers: tuple[int, ...] = (0, 1, 2, 3, 4, 5)
    num_documents: int = 16
    length: int = 512
    spectrum_documents: int = 2
    fitted_lens: tuple[int, ...] = (16, 64, 256)
    fit_steps: int = 60
    time_lengths: tuple[int, ...] = (512, 2048, 8192)
    num_heads: int = 2
    head_dim: int = 64
    seconds_per_point: float = 0.25
    max_seconds_per_run: float = 10.0
    trained_lens: tuple[int, ...] = (16, 64, 256)
    sharing_len: int = 64
    task_length: int = 256
    num_train: int = 8192
    num_held_out: int = 1536
    num_layers: int = 1
    steps: int = 250
    num_seeds: int = 3

    def __post_init__(self) -> None:
        check_known("projections", self.projections, PROJECTIONS)
        check_known("sharings", self.sharings, SHARINGS)
        for option in ("proj_lens", "fitted_lens", "time_lengths", "trained_lens"):
            check_increasing(option, getattr(self, option), 1)
        check_increasing("layers", self.layers, 0)
        if self.num_documents < 4 or self.num_documents % 2 or not 2 <= self.length <= 512:
            raise OptionError(
                f"wanted an even number of documents from 4 on, of 2 to 512 tokens, got {self.num_documents} of "
                f"{self.length}"
            )
        if self.proj_lens[0] >= self.length:
            raise OptionError(f"wanted some of proj_lens below length={self.length}, got {list(self.proj_lens)}")
        if not set(self.fitted_lens) <= set(self.real_lens):
            raise OptionError(
                f"wanted fitted_lens among the proj_lens up to length={self.length}, {list(self.real_lens)}, got "
                f"{list(self.fitted_lens)}"
            )
        if self.trained_lens[-1] > self.task_length or self.sharing_len not in self.trained_lens:
            raise OptionError(
                f"wanted trained_lens of at most task_length={self.task_length} with sharing_len={self.sharing_len} "
                f"among them, got {list(self.trained_lens)}"
            )
        counts = ("spectrum_documents", "fit_steps", "num_heads", "head_dim", "num_train", "num_held_out")
        check_positive(self, (*counts, "num_layers", "steps", "num_seeds", "seconds_per_point", "max_seconds_per_run"))

    @classmethod
    def quick(cls) -> ProjectionStudy:
        """Under a minute on one core: three layers, one seed, a few steps."""
        return cls(
            proj_lens=(16, 64, 256, 1024),
            layers=(0, 2, 5),
            num_documents=4,
            spectrum_documents=1,
            fitted_lens=(64,),
            fit_steps=20,
            time_lengths=(512, 2048),
            seconds_per_point=0.05,
            max_seconds_per_run=2.0,
            trained_lens=(8, 32),
            sharing_len=32,
            task_length=64,
            num_train=2048,
            num_held_out=512,
            steps=140,
            num_seeds=1,
        )

    @classmethod
    def standard(cls) -> ProjectionStudy:
        """About fourteen minutes of one core; two take less."""
        return cls()

    @property
    def trained_sharings(self) -> tuple[str, ...]:
        """Modes of sharing that differ in a model of ``num_layers`` layers."""
        return tuple(sharing for sharing in self.sharings if self.num_layers > 1 or sharing != "layerwise")

    @property
    def real_lens(self) -> tuple[int, ...]:
        """The k that real documents have room for."""
        return tuple(k for k in self.proj_lens if k <= self.length)


def run(job: ProjectionStudy, journal: Journal | None = None, progress: Progress | None = None) -> Study:
    """Measure spectra, errors, fits, latencies and trained accuracies as ``job`` says.

    Args:
        job: settings.
        journal: holds what an interrupted run has measured; None keeps everything in memory.
        progress: is told of every cell.

    Returns:
        The study; ``maclin.report.write_study`` writes it.

    Raises:
        InputError: the packaged model or the standard library's source is not installed.
    """
    journal = Journal() if journal is None else journal
    steps = Steps(progress or Silent())
    attention, latencies, trained = RealAttention(job), ProjectionLatencies(job), Trained(job)
    spectra: list[Config] = []
    errors: list[Config] = []
    with steps.step("spectra and errors on real attention", 2 * len(job.layers)) as said:
        for layer in job.layers:
            common = {**attention.common, "layer": layer, "proj_lens": list(job.proj_lens)}
            key = {"part": "spectrum", "documents": job.spectrum_documents, **common}
            spectra.append(journal.measured(key, lambda key=key: attention.spectrum(key)))
            said.advance(f"layer {layer}, spectrum")
            pooled = [projection for projection in job.projections if projection != "learned"]
            key = {"part": "error", "projections": pooled, **common}
            errors.append(journal.measured(key, lambda key=key: attention.errors(key)))
            said.advance(f"layer {layer}, errors")
    keys = _fit_keys(job, attention.common)
    with steps.step("fit learned projections", len(keys)) as said:
        fits = journal.all_measured(keys, attention.fit, said, lambda key: f"k = {key['k']}, {key['sharing']}")
    timed: list[Config] = []
    with steps.step("latencies beside fused softmax") as said:
        for key in latencies.cells():
            timed.append(journal.measured(key, lambda key=key: latencies.measure(key, timed, said.advance)))
    keys = trained.cells()

    def trained_text(key: Config) -> str:
        k = "" if key["k"] is None else f", k = {key['k']}"
        return f"{key['method']}{k}, seed {key['seed']}"

    with steps.step("train tiny Transformers", len(keys)) as said:
        runs = journal.all_measured(keys, trained.measure, said, trained_text)
    found = Measurements(spectra, errors, fits, timed, runs, trained.task.majority_accuracy)
    return Study(
        schema_version=SCHEMA_VERSION,
        name="projection",
        question=QUESTION,
        findings=findings_of(job, found),
        settings=json.loads(json.dumps(dataclasses.asdict(job))),
        environment=environment(),
        measurements=(*spectra, *errors, *fits, *timed, *runs, {"part": "task", "majority_accuracy": found.majority}),
        tables=tables_of(job, found),
        charts=charts_of(job, found),
        heat_maps=heat_maps_of(job, found),
        warnings=tuple(
            f"a run did not end with a finite loss: {run['method']}, k = {run['k']}, seed {run['seed']}"
            for run in runs
            if run["diverged_at_step"] is not None
        ),
        seconds=steps.seconds,
    )


def _fit_keys(job: ProjectionStudy, common: Config) -> list[Config]:
    """One fit for each layer, k and mode; "layerwise" is one for all layers."""
    if "learned" not in job.projections:
        return []
    return [
        {"part": "fit", **common, "k": k, "sharing": sharing, "layers": layers, "steps": job.fit_steps}
        for k in job.fitted_lens
        for sharing in job.sharings
        for layers in ([list(job.layers)] if sharing == "layerwise" else [[layer] for layer in job.layers])
    ]
