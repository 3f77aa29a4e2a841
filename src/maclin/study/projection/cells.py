"""What the projection study measures on real q, k and v: spectra, errors, fitted projections; and latencies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.mechanisms import Mechanism, mechanism
from ...core.mechanisms.linformer import Linformer
from ...core.reference import softmax_attention
from ...records import Config
from ..data import Problem, RealProblems, real
from ..latencies import latencies

if TYPE_CHECKING:
    from . import ProjectionStudy

K_FREE = {"uniform": "mean", "efficient": "efficient", "revisited_linformer": "revisited_linformer"}
"""What has no k, by the name to show."""
POOLED = ("mean-pool", "max-pool", "conv")
ENERGIES = (0.5, 0.9, 0.99)
"""Shares of the energy of an attention matrix for which the number of singular values is given."""
_FIT_BATCH, _FIT_RATE = 2, 3e-4


def linformer_name(projection: str, proj_len: int, sharing: str | None = None) -> str:
    """What a Linformer is called in cells; only a learned one has a mode of sharing."""
    mode = projection if sharing is None else f"{projection} {sharing}"
    return f"linformer {mode}, k = {proj_len}"


class RealAttention:
    """The layers of the packaged model, captured once, when the first cell asks for them."""

    def __init__(self, job: ProjectionStudy) -> None:
        self.job = job
        self._real: RealProblems | None = None
        self._exact: dict[tuple[str, int], Tensor] = {}

    @property
    def problems(self) -> RealProblems:
        """One problem for each layer, in a calibration and a held-out part."""
        if self._real is None:
            self._real = real(self.job.layers, num_documents=self.job.num_documents, length=self.job.length)
        return self._real

    @property
    def common(self) -> Config:
        """What every cell of real data depends on."""
        return {"num_documents": self.job.num_documents, "document_tokens": self.job.length}

    @torch.no_grad()
    def spectrum(self, key: Config) -> Config:
        """``heads``: for each document and head of a layer the energy and sum of singular values, cumulated.

        Also svd_rel_error (k, error of the attention output of the whole layer if its matrices are cut at rank k).
        """
        problem = self._held_out(key["layer"])
        lens = key["proj_lens"]
        heads: list[Config] = []
        lost = torch.zeros(problem.length + 1, dtype=torch.float64)
        for b in range(min(key["documents"], problem.q.shape[0])):
            for h in range(problem.num_heads):
                q, k, v = (x[b, h].double() for x in (problem.q, problem.k, problem.v))
                found, missing = _spectrum(torch.softmax(q @ k.mT * problem.scale, dim=-1), v)
                heads.append({"document": b, "head": h, **found})
                lost += missing
        errors = [
            {"k": k, "rel_error": (lost[min(k, problem.length)] / lost[0]).sqrt().item()}
            for k in lens
            if k <= problem.length
        ]
        return {"heads": heads, "svd_rel_error": errors}

    @torch.no_grad()
    def errors(self, key: Config) -> Config:
        """``errors``: rows of method, projection, k and rel_error on the held-out documents of a layer."""
        problem, exact = self._held_out(key["layer"]), self._target("held_out", key["layer"])
        rows: list[Config] = []
        for method, projection, k, mech in self._methods(problem, key["proj_lens"], key["projections"]):
            # Efficient Attention has no logits to scale
            out = mech(problem.q, problem.k, problem.v) if method == "efficient" else _call(mech, problem)
            rows.append({"method": method, "projection": projection, "k": k, "rel_error": _rel_error(out, exact)})
        return {"errors": rows}

    def fit(self, key: Config) -> Config:
        """``fitted``: errors of a learned projection fitted on the calibration documents, there and on held-out ones.

        E and F start as mean pooling and move by Adam against the exact output; several layers if they share E.
        """
        calibration = [self.problems.calibration[self._place(layer)] for layer in key["layers"]]
        targets = [self._target("calibration", layer) for layer in key["layers"]]
        mechs = _learned(calibration, key["k"], key["sharing"], self.job.length)
        parameters = list(dict.fromkeys(p for mech in mechs for p in mech.parameters()))
        optimiser = torch.optim.Adam(parameters, lr=_FIT_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, key["steps"])
        generator = torch.Generator().manual_seed(0)
        for _ in range(key["steps"]):
            index = torch.randperm(len(calibration[0].q), generator=generator)[:_FIT_BATCH]
            optimiser.zero_grad()
            for mech, problem, target in zip(mechs, calibration, targets, strict=True):
                out = mech(problem.q[index], problem.k[index], problem.v[index], scale=problem.scale)
                ((out - target[index]).square().sum() / target[index].square().sum()).backward()
            optimiser.step()
            schedule.step()
        rows: list[Config] = []
        with torch.no_grad():
            for layer, mech, problem, target in zip(key["layers"], mechs, calibration, targets, strict=True):
                held, exact = self._held_out(layer), self._target("held_out", layer)
                rows.append(
                    {
                        "layer": layer,
                        "calibration_rel_error": _rel_error(_call(mech, problem), target),
                        "held_out_rel_error": _rel_error(_call(mech, held), exact),
                    }
                )
        return {"fitted": rows}

    def _methods(
        self, problem: Problem, lens: Sequence[int], projections: Sequence[str]
    ) -> Iterator[tuple[str, str | None, int | None, Mechanism]]:
        sizes = {"head_dim": problem.head_dim, "num_heads": problem.num_heads}
        for shown, name in K_FREE.items():
            yield shown, None, None, mechanism(name, **sizes)
        for projection in projections:
            for k in lens:
                if k <= problem.length:
                    yield "linformer", projection, k, mechanism("linformer", proj_len=k, projection=projection, **sizes)

    def _held_out(self, layer: int) -> Problem:
        return self.problems.held_out[self._place(layer)]

    def _place(self, layer: int) -> int:
        return self.job.layers.index(layer)

    def _target(self, part: str, layer: int) -> Tensor:
        """Exact output of a layer on the documents of a part, rounded to float32 and kept."""
        if (part, layer) not in self._exact:
            problem = getattr(self.problems, part)[self._place(layer)]
            documents = zip(problem.q, problem.k, problem.v, strict=True)
            exact = [softmax_attention(q[None], k[None], v[None], scale=problem.scale) for q, k, v in documents]
            self._exact[part, layer] = torch.cat(exact).float()
        return self._exact[part, layer]


def _spectrum(weights: Tensor, v: Tensor) -> tuple[Config, Tensor]:
    """Figures of one attention matrix (N, S), and the squared error of P v at every rank from 0 to S.

    sigma_i^2 and right singular vectors u_i are those of P^T P; P u_i are orthogonal with norms sigma_i, so that the
    rank-k cut of P leaves out sum_{i > k} sigma_i^2 |v^T u_i|^2 of |P v|^2.
    """
    squares, vectors = torch.linalg.eigh(weights.mT @ weights)
    squares, vectors = squares.flip(0).clamp_min(0.0), vectors.flip(1)
    energy = squares.cumsum(0) / squares.sum()
    values = squares.sqrt()
    shares = values / values.sum()
    of_output = squares * (vectors.mT @ v).square().sum(-1)
    missing = torch.cat([of_output.flip(0).cumsum(0).flip(0), of_output.new_zeros(1)])
    steps = _indices(len(squares))
    return {
        "effective_rank": torch.special.entr(shares).sum().exp().item(),
        **{f"rank_{100 * e:g}": int((energy < e).sum()) + 1 for e in ENERGIES},
        "index": steps,
        "energy": [energy[i - 1].item() for i in steps],
        "singular_sum": [shares.cumsum(0)[i - 1].item() for i in steps],
    }, missing


def _indices(length: int) -> list[int]:
    """1, 2, 3, 4, 6, 8, 12, ... and the length: where a cumulated spectrum is kept."""
    steps = sorted({length, *(2**i for i in range(20)), *(3 * 2**i for i in range(20))})
    return [step for step in steps if step <= length]


def _learned(problems: Sequence[Problem], k: int, sharing: str, seq_len: int) -> list[Linformer]:
    """A Linformer for each problem that starts as mean pooling; "layerwise" gives all the E of the first."""
    segment = torch.arange(seq_len) * k // seq_len
    pooling = nn.functional.one_hot(segment, k).mT.float()
    pooling /= pooling.sum(-1, keepdim=True)
    mechs: list[Linformer] = []
    for problem in problems:
        shared = mechs[0].E if mechs and sharing == "layerwise" else None
        mech = mechanism(
            "linformer",
            head_dim=problem.head_dim,
            num_heads=problem.num_heads,
            seq_len=seq_len,
            proj_len=k,
            sharing=sharing,
            shared=shared,
            generator=torch.Generator().manual_seed(0),
        )
        assert isinstance(mech, Linformer)
        with torch.no_grad():
            for parameter in mech.parameters():
                parameter.copy_(pooling.expand_as(parameter))
        mechs.append(mech)
    return mechs


def _call(mech: Mechanism, problem: Problem) -> Tensor:
    return mech(problem.q, problem.k, problem.v, scale=problem.scale)


def _rel_error(out: Tensor, exact: Tensor) -> float:
    return ((out - exact).double().norm() / exact.double().norm()).item()


class ProjectionLatencies:
    """Latency of every mode and k, and of what has no k; one cell for each length."""

    def __init__(self, job: ProjectionStudy) -> None:
        self.job = job

    def cells(self) -> list[Config]:
        """The cells to measure, ascending."""
        job = self.job
        common = {
            "part": "time",
            "proj_lens": list(job.proj_lens),
            "projections": list(job.projections),
            "head_dim": job.head_dim,
            "num_heads": job.num_heads,
            "seconds_per_point": job.seconds_per_point,
            "max_seconds_per_run": job.max_seconds_per_run,
        }
        return [{**common, "length": length} for length in job.time_lengths]

    def measure(self, key: Config, before: Sequence[Config], say: Callable[[str], None]) -> Config:
        """As ``_latencies.latencies``; ``before`` are the cells of shorter lengths."""
        job, length = self.job, key["length"]
        sizes = {"head_dim": job.head_dim, "num_heads": job.num_heads}
        subjects = {shown: mechanism(name, **sizes) for shown, name in K_FREE.items()}
        for projection in job.projections:
            for k in job.proj_lens:
                if k <= length:
                    options = {"seq_len": length} if projection == "learned" else {}
                    mech = mechanism("linformer", proj_len=k, projection=projection, **options, **sizes)
                    subjects[linformer_name(projection, k)] = mech
        return latencies(
            subjects,
            length,
            before,
            seconds_per_point=job.seconds_per_point,
            max_seconds_per_run=job.max_seconds_per_run,
            say=say,
        )
