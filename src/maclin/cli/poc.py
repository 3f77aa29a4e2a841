"""``maclin poc``: the main job."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..core.errors import OptionError
from . import console
from .arguments import Data, Device, Model, Quiet

if TYPE_CHECKING:
    from ..records import Report


def poc(
    model: Model = None,
    data: Data = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens at which attention is measured, by commas; the model up to its own limit. Default: "
            "doubled from 128 to 16384."
        ),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error of a layer's attention output that the plan accepts; 0.1 without --speedup."
        ),
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(help="Of attention, that the plan is to reach at the least error.")
    ] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Let the plan mix mechanisms within a layer, and keep heads exact.")
    ] = False,
    device: Device = "auto",
    out: Annotated[Path, typer.Option(help="Directory of the report.")] = Path("poc-report"),
    max_documents: Annotated[int, typer.Option(help="Use at most so many documents; half are held out.")] = 64,
    seconds_per_point: Annotated[float, typer.Option(help="Time to spend on each latency.")] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier report.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON; implies no progress.")] = False,
) -> None:
    """Judge a model: what linear attention would cost it in accuracy, and save in time and memory.

    Writes report.html, report.md and report.json into the directory of --out.
    """
    from ..poc import DEFAULT_LENGTHS, ProofOfConcept, run
    from ..report import check_out_dir, write_report

    check_out_dir(out, force)
    job = ProofOfConcept(
        model=model,
        data=data,
        lengths=DEFAULT_LENGTHS if lengths is None else _lengths(lengths),
        tolerance=tolerance,
        speedup=speedup,
        per_head=per_head,
        device=device,
        max_documents=max_documents,
        seconds_per_point=seconds_per_point,
    )
    if quiet or as_json:
        report = run(job)
    else:
        with console.Bars() as bars:
            report = run(job, bars)
    paths = write_report(report, out, force=force)
    if as_json:
        console.out.print(json.dumps(_summary(report, paths), indent=2), markup=False)
    elif not quiet:
        _print(report, paths)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part.strip().replace("_", "")) for part in text.split(",") if part.strip())
    except ValueError:
        raise OptionError(f"wanted --lengths as whole numbers with commas, such as 128,1024, got {text!r}") from None


def _summary(report: Report, paths: dict[str, Path]) -> dict[str, object]:
    verdict = report.verdict
    return {
        "decision": verdict.decision,
        "reason": verdict.reason,
        "recommended_num_linear": verdict.recommended_num_linear,
        "num_layers": len(report.plan.rows),
        "linear_share_within_tolerance": report.plan.linear_share,
        "pays_from_length": verdict.pays_from_length,
        "warnings": [*report.warnings, *report.data.warnings],
        "files": {kind: str(path) for kind, path in paths.items()},
    }


def _print(report: Report, paths: dict[str, Path]) -> None:
    colour = {"go": "green", "go-after-healing": "yellow"}.get(report.verdict.decision, "red")
    for warning in (*report.data.warnings, *report.warnings):
        console.err.print(f"warning: {warning}", markup=False)
    console.out.print(f"[bold {colour}]{report.verdict.decision}[/]")
    console.out.print(report.verdict.reason, markup=False, soft_wrap=False)
    console.out.print(f"Report: {paths['html']}", markup=False)
