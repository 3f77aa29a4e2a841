"""Arguments and options that several commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from ..core.errors import OptionError

Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="Directory that transformers or sentence-transformers can load; by default the packaged "
        "all-MiniLM-L6-v2. Nothing is downloaded.",
    ),
]
"""A model that is there already."""

Data = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILES",
        help="Documents (.txt, .md, .jsonl) or directories of them, after MODEL. Default: the help texts that "
        "ship with Python.",
    ),
]
"""Documents of the user."""

MechanismOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="Of the mechanism, such as window=32; again for more."),
]
"""Read by ``options_of``."""

Layer = Annotated[
    list[str] | None,
    typer.Option(help="Layer to convert without a plan, by name or number from 0 on; again for more. Default: all."),
]
"""Layers to convert alike."""

Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
"""Where to compute."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary.")]
"""Print nothing but errors."""


def options_of(pairs: list[str]) -> dict[str, Any]:
    """Values as JSON where they are JSON (128, false, [1, 32]), else as text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise OptionError(f"wanted --option as KEY=VALUE, such as num_features=128, got {pair!r}")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError:
            found[key] = value
    return found
