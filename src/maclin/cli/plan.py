"""``maclin plan``: what each layer of a model is to become, for a wanted speed-up or a tolerance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import MaclinError
from . import console
from .arguments import Data, Device, Model, Quiet


def plan(
    model: Model = None,
    data: Data = None,
    speedup: Annotated[float | None, typer.Option(help="How many times as fast; the plan of least error.")] = None,
    of: Annotated[str, typer.Option(help="What is to be so much faster: attention, or the model.")] = "attention",
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error of a layer's attention output. Default: 0.1 without other budgets."),
    ] = None,
    min_layers: Annotated[int, typer.Option(help="Layers that are to become of linear cost, at least.")] = 0,
    max_layers: Annotated[int | None, typer.Option(help="Layers that may be changed, at most.")] = None,
    per_head: Annotated[
        bool, typer.Option("--per-head", help="Mix mechanisms within a layer; heads that none follows stay exact.")
    ] = False,
    try_each: Annotated[
        bool,
        typer.Option(
            "--try-each", help="Try each mechanism in each layer alone: slower, and a better choice of layers."
        ),
    ] = False,
    length: Annotated[
        int | None, typer.Option(help="Tokens that costs are measured at. Default: the longest document.")
    ] = None,
    costs: Annotated[str, typer.Option(help="measured on this machine, or operations.")] = "measured",
    device: Device = "auto",
    max_documents: Annotated[int, typer.Option(help="Use at most so many documents; a third calibrates.")] = 64,
    out: Annotated[Path, typer.Option(help="File of the plan, for maclin convert --plan.")] = Path("plan.json"),
    audit_out: Annotated[Path | None, typer.Option("--audit", help="Also write the audit to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace earlier files.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON; implies no progress.")] = False,
) -> None:
    """Decide what each layer becomes: the least error for a speed-up, or the least time for a tolerance.

    Writes the plan into the file of --out. The model is audited and left as it is.
    """
    from ..adopt import save_plan
    from ..files import write_whole
    from ..poc import PlanJob, plan_model
    from ..records import to_json

    for file in filter(None, (out, audit_out)):
        if file.exists() and not force:
            raise FileExistsError(f"{file} is there already; pass --force to replace it, or another name")
    kinds: Any = {"of": of, "costs": costs}
    job = PlanJob(
        model=model,
        data=data,
        tolerance=tolerance,
        speedup=speedup,
        min_layers=min_layers,
        max_layers=max_layers,
        per_head=per_head,
        try_each=try_each,
        length=length,
        device=device,
        max_documents=max_documents,
        **kinds,
    )
    if quiet or as_json:
        chosen, found = plan_model(job)
    else:
        with console.Bars() as bars:
            chosen, found = plan_model(job, bars)
    save_plan(chosen, out)
    if audit_out is not None:
        try:
            write_whole(audit_out, to_json(found).encode())
        except OSError as error:
            raise MaclinError(f"cannot write to {audit_out}: {error.strerror or error}") from error
    if as_json:
        console.out.print(to_json(chosen), markup=False)
    elif not quiet:
        for warning in found.warnings:
            console.err.print(f"warning: {warning}", markup=False)
        console.out.print(str(chosen), markup=False)
        console.out.print(f"Plan: {out}", markup=False)
