"""``maclin diagnose``: head by head, what a mechanism does in the layers of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import MaclinError
from . import console
from .arguments import Data, Model, options_of

if TYPE_CHECKING:
    from ..records import Diagnosis


def diagnose(
    model: Model = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Layer to look at, by name or number from 0 on; again for more. Default: all."),
    ] = None,
    mechanism: Annotated[str, typer.Option(help="See maclin mechanisms.")] = "macformer",
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of the mechanism, such as num_features=128; again for more."),
    ] = None,
    data: Data = None,
    max_documents: Annotated[int, typer.Option(help="Use at most so many documents; a third calibrates.")] = 18,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON to this file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier file.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show for every head of a model's layers what a mechanism's kernel is given, and what its output is worth.

    A mechanism that learns from data is calibrated on every third document and looked at on the others.
    """
    from ..adopt import diagnose_layers, load, packaged_model, python_documents, read_documents
    from ..records import to_json

    if out is not None and out.exists() and not force:
        raise FileExistsError(f"{out} is there already; pass --force to replace it, or another --out")
    loaded = load(packaged_model() if model is None else model)
    documents = (python_documents() if data is None else read_documents(data)).spread(max_documents)
    batches = loaded.tokenize(documents.texts, batch_size=4)
    found: dict[str, Any] = {}
    for name, diagnosis in diagnose_layers(loaded.model, batches, mechanism, options_of(option or []), layer):
        found[name] = json.loads(to_json(diagnosis))
        if not as_json:
            _print(name, diagnosis)
    text = json.dumps(found, indent=2)
    if as_json:
        console.out.print(text, markup=False)
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise MaclinError(f"cannot write to {out}: {error.strerror or error}; choose another place") from error


def _print(name: str, diagnosis: Diagnosis) -> None:
    console.out.print(name, markup=False, style="bold")
    console.out.print(str(diagnosis), markup=False)
    console.out.print()
