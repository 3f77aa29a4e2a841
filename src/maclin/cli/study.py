"""``maclin study``: the papers' own experiments."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import OptionError
from . import console

if TYPE_CHECKING:
    from ..records import Study

app = typer.Typer(
    name="study",
    help="The papers' own experiments, on data that is at hand; an interrupted one goes on where it stopped.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Out = Annotated[Path | None, typer.Option(help="Directory of the study. Default: study- and the name.")]
_Quick = Annotated[bool, typer.Option("--quick", help="Small sizes and few seeds, to see what it is about.")]
_Seeds = Annotated[int | None, typer.Option(help="Repetitions with new draws, from which the spread comes.")]
_Force = Annotated[bool, typer.Option("--force", help="Replace an earlier study, or measurements that do not fit.")]
_Json = Annotated[bool, typer.Option("--json", help="Print the findings as JSON; implies no progress.")]
_Lengths = Annotated[str | None, typer.Option(help="Tokens, by commas.")]
_Features = Annotated[str | None, typer.Option(help="Numbers of random features, by commas.")]
_Kernels = Annotated[str | None, typer.Option(help="exp, inv, log, sqrt, trigh; by commas.")]
_Estimators = Annotated[str | None, typer.Option(help="Of macformer, by commas.")]
_Data = Annotated[str | None, typer.Option(help="aligned, isotropic, real; by commas.")]
_Layers = Annotated[str | None, typer.Option(help="Of the packaged model, counted from 0, by commas.")]
_HeadDim = Annotated[int | None, typer.Option(help="Width of a head.")]


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def projection(
    out: _Out = None,
    quick: _Quick = False,
    seeds: _Seeds = None,
    lengths: _Lengths = None,
    proj_lens: Annotated[str | None, typer.Option(help="k, by commas.")] = None,
    fitted_lens: Annotated[str | None, typer.Option(help="k for which projections are fitted, by commas.")] = None,
    trained_lens: Annotated[str | None, typer.Option(help="k of the models that are trained, by commas.")] = None,
    sharing_len: Annotated[int | None, typer.Option(help="The one of them for which every sharing is trained.")] = None,
    projections: Annotated[str | None, typer.Option(help="Modes of linformer, by commas.")] = None,
    sharings: Annotated[str | None, typer.Option(help="Of the learned mode, by commas.")] = None,
    layers: _Layers = None,
    steps: Annotated[int | None, typer.Option(help="Of training.")] = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Linformer's modes over the projection length k: error, spectrum, latency and trained accuracy."""
    from ..study import projection as study

    changes = {
        "num_seeds": seeds,
        "time_lengths": _whole(lengths, "--lengths"),
        "proj_lens": _whole(proj_lens, "--proj-lens"),
        "fitted_lens": _whole(fitted_lens, "--fitted-lens"),
        "trained_lens": _whole(trained_lens, "--trained-lens"),
        "sharing_len": sharing_len,
        "projections": _names(projections),
        "sharings": _names(sharings),
        "layers": _whole(layers, "--layers"),
        "steps": steps,
    }
    _carry_out(_Call("projection", study.ProjectionStudy, study.run, changes, out, quick, force, as_json))


@app.command()
def approximation(
    out: _Out = None,
    quick: _Quick = False,
    seeds: _Seeds = None,
    lengths: _Lengths = None,
    features: _Features = None,
    kernels: _Kernels = None,
    head_dim: _HeadDim = None,
    estimators: _Estimators = None,
    data: _Data = None,
    scales: Annotated[str | None, typer.Option(help="Of the logits, by commas.")] = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Error and latency of every kernel and estimator over lengths and numbers of features, beside other methods."""
    from ..study import approximation as study

    changes = {
        "num_seeds": seeds,
        "lengths": _whole(lengths, "--lengths"),
        "features": _whole(features, "--features"),
        "kernels": _names(kernels),
        "head_dim": head_dim,
        "estimators": _names(estimators),
        "data": _names(data),
        "scales": _numbers(scales, "--scales"),
    }
    _carry_out(_Call("approximation", study.ApproximationStudy, study.run, changes, out, quick, force, as_json))


@app.command()
def ppsbn(
    out: _Out = None,
    quick: _Quick = False,
    seeds: _Seeds = None,
    estimators: _Estimators = None,
    data: _Data = None,
    radii: Annotated[str | None, typer.Option(help="Of the drawn data, by commas.")] = None,
    layers: _Layers = None,
    features: Annotated[int | None, typer.Option(help="Random features in training.")] = None,
    error_features: Annotated[int | None, typer.Option(help="Random features where errors are measured.")] = None,
    batch_sizes: Annotated[str | None, typer.Option(help="Of training, by commas.")] = None,
    learning_rates: Annotated[str | None, typer.Option(help="Of training, by commas.")] = None,
    examples: Annotated[int | None, typer.Option(help="Seen in each training run.")] = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """What ppSBN, its halves and its absence do to the error of attention and to training."""
    from ..study import ppsbn as study

    changes = {
        "num_seeds": seeds,
        "estimators": _names(estimators),
        "data": _names(data),
        "radii": _numbers(radii, "--radii"),
        "layers": _whole(layers, "--layers"),
        "num_features": features,
        "error_features": error_features,
        "batch_sizes": _whole(batch_sizes, "--batch-sizes"),
        "learning_rates": _numbers(learning_rates, "--learning-rates"),
        "num_examples": examples,
    }
    _carry_out(_Call("ppsbn", study.PpsbnStudy, study.run, changes, out, quick, force, as_json))


@app.command()
def theory(
    out: _Out = None,
    quick: _Quick = False,
    seeds: _Seeds = None,
    features: _Features = None,
    kernels: _Kernels = None,
    head_dim: _HeadDim = None,
    laws: Annotated[str | None, typer.Option(help="Of the degrees: published, kar_karnick; by commas.")] = None,
    sketches: Annotated[str | None, typer.Option(help="rademacher, gaussian, complex, srht; by commas.")] = None,
    max_degree: Annotated[int | None, typer.Option(help="Highest degree n of <x, y>^n.")] = None,
    radii: Annotated[str | None, typer.Option(help="|x||y|, by commas.")] = None,
    cosines: Annotated[str | None, typer.Option(help="Of the angle between x and y, by commas.")] = None,
    force: _Force = False,
    as_json: _Json = False,
) -> None:
    """Closed forms for random Maclaurin features beside simulation, and what a concentration bound is worth."""
    from ..study import theory as study

    changes = {
        "num_seeds": seeds,
        "features": _whole(features, "--features"),
        "kernels": _names(kernels),
        "head_dim": head_dim,
        "laws": _names(laws),
        "sketches": _names(sketches),
        "max_degree": max_degree,
        "radii": _numbers(radii, "--radii"),
        "cosines": _numbers(cosines, "--cosines"),
    }
    _carry_out(_Call("theory", study.TheoryStudy, study.run, changes, out, quick, force, as_json))


@dataclass(frozen=True)
class _Call:
    """One call of the command: which study, with what changes to its preset, and where to."""

    name: str
    settings: Any  # the dataclass, with quick() and standard()
    run: Callable[..., Study]
    changes: dict[str, Any]  # None: as the preset has it
    out: Path | None
    quick: bool
    force: bool
    as_json: bool


def _carry_out(call: _Call) -> None:
    from ..study import Session

    preset = call.settings.quick() if call.quick else call.settings.standard()
    job = replace(preset, **{field: value for field, value in call.changes.items() if value is not None})
    with Session(call.name, job, call.out or Path(f"study-{call.name}"), call.force) as session:
        if session.num_resumed:
            console.err.print(f"going on after {session.num_resumed} measurements in {session.path}", markup=False)
        try:
            if call.as_json:
                study = call.run(job, session.journal)
            else:
                with console.Bars() as bars:
                    study = call.run(job, session.journal, bars)
            paths = session.write(study)
        except KeyboardInterrupt:
            kept = session.num_measured
            if not kept:
                raise
            console.error(
                f"interrupted; {kept} measurements are kept in {session.path}, and the same command goes on after them"
            )
            raise SystemExit(console.INTERRUPTED) from None
    _print(study, paths, call.as_json)


def _print(study: Study, paths: dict[str, Path], as_json: bool) -> None:
    if as_json:
        summary = {
            "study": study.name,
            "question": study.question,
            "findings": study.findings,
            "warnings": study.warnings,
            "files": {kind: str(path) for kind, path in paths.items()},
        }
        console.out.print(json.dumps(summary, indent=2, ensure_ascii=False), markup=False)
        return
    for warning in study.warnings:
        console.err.print(f"warning: {warning}", markup=False)
    console.out.print(study.question, markup=False, soft_wrap=False, style="bold")
    for sentence in study.findings:
        console.out.print(f"- {sentence}", markup=False, soft_wrap=False)
    console.out.print(f"Study: {paths['html']}", markup=False)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _whole(text: str | None, option: str) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in _names(text) or ())
    except ValueError:
        raise OptionError(f"wanted {option} as whole numbers with commas, such as 32,128, got {text!r}") from None


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in _names(text) or ())
    except ValueError:
        raise OptionError(f"wanted {option} as numbers with commas, such as 0.5,1, got {text!r}") from None
