"""``maclin convert``: a model converted by a plan, or all layers alike, and saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import OptionError
from ..progress import Progress, Silent, Steps
from . import console
from .arguments import Layer, MechanismOption, Model, Quiet, options_of

if TYPE_CHECKING:
    from torch import nn

    from ..adopt import Loaded

_HINT = "on the command line, name them with --documents FILES"


def convert(
    model: Model = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json that says what each layer becomes.")] = None,
    mechanism: Annotated[
        str | None, typer.Option(help="What layers become without a plan; see maclin mechanisms.")
    ] = None,
    option: MechanismOption = None,
    layer: Layer = None,
    documents: Annotated[
        list[Path] | None,
        typer.Option(
            "--documents",
            "--data",
            metavar="FILES",
            help="Documents (.txt, .md, .jsonl) or directories of them, to calibrate on what learns from data.",
        ),
    ] = None,
    max_documents: Annotated[int, typer.Option(help="Calibrate on at most so many documents.")] = 64,
    out: Annotated[Path, typer.Option(help="Directory of the converted model.")] = Path("converted"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier converted model.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON; implies no progress.")] = False,
) -> None:
    """Convert a model and save it, for maclin.load_converted.

    The tokenizer is copied along. On an error or Ctrl-C, what was in the directory of --out is still there.
    """
    from ..adopt import load, load_plan, packaged_model, save_converted
    from ..adopt.saving import MANIFEST
    from ..report import check_out_dir

    if (plan is None) == (mechanism is None):
        raise OptionError("wanted either --plan FILE or --mechanism NAME; maclin mechanisms lists the names")
    if plan is not None and (option or layer):
        raise OptionError("a plan says itself which layers become what; leave out --option and --layer, or --plan")
    check_out_dir(out, force, names=(MANIFEST,), noun="model")
    what: Any = mechanism if plan is None else load_plan(plan)
    directory = packaged_model() if model is None else Path(model)
    with console.Bars() if not (quiet or as_json) else _Nothing() as told:
        steps = Steps(told)
        with steps.step("load the model"):
            loaded = load(directory)
        options = options_of(option or [])
        converted = _converted(steps, directory, loaded, what, options, layer, documents, max_documents)
        with steps.step("save"):
            save_converted(converted, out, directory)
    _report(out, directory, quiet, as_json)


def _converted(
    steps: Steps,
    directory: Path,
    loaded: Loaded,
    what: Any,
    options: dict[str, Any],
    layer: list[str] | None,
    documents: list[Path] | None,
    max_documents: int,
) -> nn.Module:
    from ..adopt import convert_, read_documents
    from ..adopt.hosts import layers_of
    from ..adopt.whole import load_whole, plan_for
    from ..records import Plan

    batches: Any = None
    if documents is not None:
        with steps.step("read the documents"):
            texts = read_documents(documents).spread(max_documents).texts
            batches = loaded.tokenize(texts, batch_size=4)
    with steps.step("convert"):
        model = load_whole(directory, loaded)
        names = [found.name for found in layers_of(model, batches or ())[0]]
        if isinstance(what, Plan):
            what = plan_for(what, names)
        elif layer:
            chosen = [names[int(name)] if name.isdigit() and int(name) < len(names) else name for name in layer]
            what, options = dict.fromkeys(chosen, (what, options)), {}
        try:
            convert_(model, what, batches=batches, **options)
        except OptionError as error:
            if batches is None and "batches=" in str(error):
                raise OptionError(f"{error}; {_HINT}") from error
            raise
    return model


def _report(out: Path, directory: Path, quiet: bool, as_json: bool) -> None:
    from ..adopt.saving import MANIFEST

    manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    if as_json:
        summary = {
            "directory": str(out),
            "architecture": manifest["architecture"],
            "needs_model": manifest["description"] is None,
            "num_bytes": manifest["num_bytes"],
            "layers": {row["layer"]: row["mechanism"] for row in manifest["layers"]},
        }
        console.out.print(json.dumps(summary, indent=2), markup=False)
    if quiet or as_json:
        return
    for row in manifest["layers"]:
        console.out.print(f"{row['layer']}: {row['mechanism']}", markup=False)
    given = "" if manifest["description"] is not None else f", model=SentenceTransformer({str(directory)!r})"
    console.out.print(f"Load it with maclin.load_converted({str(out)!r}{given})", markup=False)


class _Nothing(Silent):
    """No progress."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        pass
