"""``maclin heal``: a model converted and brought back to its original, on the user's documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ..core.errors import OptionError
from . import console
from .arguments import Data, Layer, MechanismOption, Model, Quiet, options_of

if TYPE_CHECKING:
    from ..adopt import Loaded
    from ..records import HealResult, Plan


def heal(
    model: Model = None,
    data: Data = None,
    plan: Annotated[Path | None, typer.Option(help="A plan.json to convert by; default: all layers alike.")] = None,
    mechanism: Annotated[
        str, typer.Option(help="What layers become without a plan; see maclin mechanisms.")
    ] = "hybrid",
    option: MechanismOption = None,
    layer: Layer = None,
    minutes: Annotated[
        float | None, typer.Option(help="Budget, everything included. Default: 15, without --steps.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Budget, in steps of distillation.")] = None,
    train: Annotated[str, typer.Option(help="all, low_rank (needs peft) or features.")] = "all",
    max_length: Annotated[int | None, typer.Option(help="Cut documents after so many tokens.")] = None,
    batch_size: Annotated[int, typer.Option(help="Documents per step; those of like length share one.")] = 8,
    max_documents: Annotated[int, typer.Option(help="Use at most so many; an eighth is held out.")] = 2048,
    out: Annotated[Path, typer.Option(help="Directory of the healed model, the report and the checkpoint.")] = Path(
        "healed"
    ),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what was interrupted.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier result.")] = False,
    quiet: Quiet = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON; implies no progress.")] = False,
) -> None:
    """Convert a model and heal it: train it to give its original's outputs again.

    Pass documents like those to be served.

    Writes the healed model into OUT/model, and heal.html, heal.md and heal.json into OUT.
    """
    from ..adopt import heal as run
    from ..adopt import load, packaged_model, python_documents, read_documents, save_converted, unknown_id_of
    from ..bench import environment
    from ..records import to_json
    from ..report import HEAL_NAMES, check_out_dir, write_heal

    check_out_dir(out, force or resume, names=HEAL_NAMES, noun="report")
    directory = packaged_model() if model is None else Path(model)
    loaded = load(directory)
    documents = (python_documents() if data is None else read_documents(data)).spread(max_documents)
    learn, held = documents.split(8)
    batches, held_out = ([*_batches(loaded, part.texts, max_length, batch_size)] for part in (learn, held))
    _convert(loaded, plan, mechanism, option, layer, batches)
    checkpoint = out / "checkpoint"
    if force and not resume:
        _clear(checkpoint)
    arguments: dict[str, Any] = {
        "budget_minutes": 15.0 if minutes is None and steps is None else minutes,
        "steps": steps,
        "train": cast(Any, train),
        "unknown_id": unknown_id_of(lambda texts: loaded.tokenize(texts)),
        "out": checkpoint,
        "resume": resume,
    }
    if quiet or as_json:
        result = run(loaded.model, batches, held_out, **arguments)
    else:
        with console.Bars() as bars:
            result = run(loaded.model, batches, held_out, progress=bars, **arguments)
    result = replace(result, environment=environment(next(loaded.model.parameters()).device))
    save_converted(loaded.model, out / "model", directory)
    paths = write_heal(result, out)
    if result.stopped != "interrupted":
        _clear(checkpoint)
    if as_json:
        console.out.print(to_json(result), markup=False)
    elif not quiet:
        _print(result, paths, out)
    if result.stopped == "interrupted":
        raise typer.Exit(console.INTERRUPTED)


def _batches(loaded: Loaded, texts: tuple[str, ...], max_length: int | None, batch_size: int) -> list[dict[str, Any]]:
    """Documents of like length together, so that little is padding."""
    return loaded.tokenize(sorted(texts, key=len), max_length, batch_size)


def _convert(
    loaded: Loaded,
    plan: Path | None,
    mechanism: str,
    option: list[str] | None,
    layer: list[str] | None,
    batches: list[dict[str, Any]],
) -> None:
    """By the plan, or all layers, or those named, alike."""
    from ..adopt import convert_, load_plan

    if plan is not None:
        if option or layer:
            raise OptionError("a plan says itself which layers become what; leave out --option and --layer, or --plan")
        decided: Plan = load_plan(plan)
        convert_(loaded.model, decided, batches=batches)
        return
    options = options_of(option or [])
    if mechanism == "hybrid":
        options = {"window": 64, **options}
    if not layer:
        convert_(loaded.model, mechanism, **options)
        return
    from ..adopt.hosts import host

    known = [found.name for found in host(loaded.model).layers(batches[0])]
    names = [known[int(name)] if name.isdigit() and int(name) < len(known) else name for name in layer]
    convert_(loaded.model, dict.fromkeys(names, (mechanism, options)))


def _clear(checkpoint: Path) -> None:
    """Remove what healing keeps while it is under way, and nothing else."""
    for path in [*checkpoint.glob("*.pt"), *checkpoint.glob("*/target-*.pt")]:
        path.unlink()
    for folder in (checkpoint / "targets", checkpoint / "held-out", checkpoint):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _print(result: HealResult, paths: dict[str, Path], out: Path) -> None:
    for warning in result.warnings:
        console.err.print(f"warning: {warning}", markup=False)
    from ..report import heal_study

    for sentence in heal_study(result).findings:
        console.out.print(sentence, markup=False)
    console.out.print(f"Model: {out / 'model'}", markup=False)
    console.out.print(f"Report: {paths['html']}", markup=False)
