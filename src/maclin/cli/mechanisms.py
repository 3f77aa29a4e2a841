"""``maclin mechanisms``: what there is, and what each can do."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from . import console


def mechanisms(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the mechanisms: what each is, whether its cost is linear, whether it can be causal, its options."""
    from ..core import mechanisms as registry

    rows = [registry.row(name) for name in registry.names()]
    if as_json:
        console.out.print(json.dumps([_as_dict(row) for row in rows], indent=2), markup=False)
        return
    table = Table()
    table.add_column("mechanism", no_wrap=True)
    table.add_column("cost", no_wrap=True)
    table.add_column("causal", no_wrap=True)
    table.add_column("what it is, and its options with their defaults", overflow="fold")
    for row in rows:
        options = ", ".join(f"{name}={value!r}" for name, value in _options(row).items())
        text = f"{row.summary}\n[dim]{options}[/dim]" if options else row.summary
        table.add_row(row.name, "linear" if row.linear else "quadratic", "yes" if row.causal else "no", text)
    console.out.print(table, soft_wrap=False)


def _options(row: Any) -> dict[str, Any]:
    return {name: value for name, value in row.options.items() if name != "shared"}  # shared is a tensor


def _as_dict(row: Any) -> dict[str, Any]:
    return {
        "name": row.name,
        "summary": row.summary,
        "linear": row.linear,
        "causal": row.causal,
        "random": row.random,
        "baseline": row.baseline,
        "options": _options(row),
        "exceptions": dict(row.exceptions),
    }
