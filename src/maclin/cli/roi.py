"""``maclin roi``: a report's latencies in money."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from . import console


def roi(
    report: Annotated[Path, typer.Argument(help="report.json of a proof of concept.")],
    price_per_hour: Annotated[float, typer.Option(help="Price of an hour of the measured machine.")],
    requests_per_day: Annotated[float, typer.Option(help="Requests per day.")],
    lengths_from: Annotated[
        Path, typer.Option(help="Lengths of sample requests in tokens: one a line, a CSV or a JSONL with 'length'.")
    ],
    effort_cost: Annotated[float | None, typer.Option(help="One-off cost of the conversion.")] = None,
    effort_hours: Annotated[float | None, typer.Option(help="Or its hours of work, with --rate-per-hour.")] = None,
    rate_per_hour: Annotated[float | None, typer.Option(help="Price of an hour of that work.")] = None,
    utilisation: Annotated[float, typer.Option(help="Share of the paid time that the machine is busy.")] = 1.0,
    currency: Annotated[str, typer.Option(help="A label; nothing is converted.")] = "USD",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Monthly cost before and after, saving and payback, from what a report measured; formulas shown."""
    from ..report import load_report, read_lengths, roi_columns, roi_dict, roi_rows
    from ..report import roi as calculate

    result = calculate(
        load_report(report),
        price_per_hour=price_per_hour,
        requests_per_day=requests_per_day,
        lengths=read_lengths(lengths_from),
        effort_cost=effort_cost,
        effort_hours=effort_hours,
        rate_per_hour=rate_per_hour,
        utilisation=utilisation,
        currency=currency,
    )
    if as_json:
        console.out.print(json.dumps(roi_dict(result), indent=2, ensure_ascii=False), markup=False)
        return
    first, *others = roi_columns(result)
    table = Table(first)
    for name in others:
        table.add_column(name, justify="right")
    for row in roi_rows(result):
        table.add_row(*row)
    console.out.print(table)
    for formula in result.formulas:
        console.out.print(f"  {formula}", markup=False)
    for note in result.notes:
        console.out.print(f"Note: {note}", markup=False)
