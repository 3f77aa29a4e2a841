"""``maclin arena``: models trained from scratch with each mechanism, on tasks with long sequences."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..core.errors import OptionError
from . import console

if TYPE_CHECKING:
    from ..records import ArenaResult

app = typer.Typer(
    name="arena",
    help="Train a model from scratch with each mechanism, on tasks with long sequences or on your own data.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_Out = Annotated[Path, typer.Option(help="Directory of the runs and their tables.")]
_Json = Annotated[bool, typer.Option("--json", help="Print a summary as JSON; implies no progress.")]


_SHOWN = 6  # columns that a terminal has room for; the page has all of them


@app.callback(invoke_without_command=True)
def _help(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(name="run")
def run_(
    task: Annotated[str, typer.Argument(metavar="TASK", help="One of `maclin arena list`.")],
    mechanism: Annotated[
        str, typer.Option(help="By commas, options behind colons: macformer:num_features=64,favor.")
    ] = "macformer",
    kernel: Annotated[str | None, typer.Option(help="exp, inv, log, sqrt, trigh; by commas, each a run.")] = None,
    preset: Annotated[str, typer.Option(help="quick (minutes, shorter sequences), standard or paper.")] = "quick",
    steps: Annotated[int | None, typer.Option(help="Of training.")] = None,
    seeds: Annotated[int, typer.Option(help="Trainings of each mechanism, from which the spread comes.")] = 3,
    batch_size: Annotated[int | None, typer.Option(help="Examples of a step, over all processes.")] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate.")] = None,
    schedule: Annotated[str | None, typer.Option(help="linear, cosine, one_cycle or constant.")] = None,
    warm_up: Annotated[float | None, typer.Option(help="Share of the steps in which the rate rises.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Parts that a batch is taken in, to save memory.")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16.")] = None,
    layers: Annotated[int | None, typer.Option(help="Of the model.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the model.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of attention.")] = None,
    position: Annotated[str | None, typer.Option(help="learned, sinusoidal, rotary or none.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Within the layers.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    data: Annotated[Path | None, typer.Option(help="Your own: a .csv, .jsonl or .npz file, or a directory.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column, key or array of the sequences.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column, key or array of the labels.")] = None,
    value_columns: Annotated[str | None, typer.Option(help="Of a .csv with one time step per row; by commas.")] = None,
    id_column: Annotated[str | None, typer.Option(help="Which series such a row belongs to.")] = None,
    test_data: Annotated[Path | None, typer.Option(help="To judge on; default: a fifth of --data.")] = None,
    length: Annotated[int | None, typer.Option(help="Positions of a sequence; longer ones are cut.")] = None,
    option: Annotated[list[str] | None, typer.Option(help="Of the task, name=value; may be repeated.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="The published data of the task, in its own layout.")] = None,
    out: _Out = Path("arena"),
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what was interrupted, keep what is done.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Drop earlier runs of the same mechanisms.")] = False,
    no_baselines: Annotated[bool, typer.Option("--no-baselines", help="Not softmax, mean and window as well.")] = False,
    no_costs: Annotated[bool, typer.Option("--no-costs", help="Do not measure what a step takes.")] = False,
    no_calibrate: Annotated[
        bool, typer.Option("--no-calibrate", help="Train mechanisms that learn from data as they are built.")
    ] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's files, too.")] = False,
    as_json: _Json = False,
) -> None:
    """Train, judge and compare mechanisms on a task.

    softmax, mean and window are run beside them. The tables are those of everything in the directory of --out.
    """
    from ..arena import ArenaJob, is_main_process, load_results, run

    train = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "schedule": schedule,
        "warm_up": warm_up,
        "accumulation": accumulation,
        "precision": precision,
        "calibrate": False if no_calibrate else None,
    }
    model = {"num_layers": layers, "width": width, "num_heads": heads, "position": position, "dropout": dropout}
    own = {
        "data": None if data is None else str(data),
        "text_column": text_column,
        "label_column": label_column,
        "value_columns": value_columns,
        "id_column": id_column,
        "test_data": None if test_data is None else str(test_data),
        "length": length,
    }
    job = ArenaJob(
        task=task,
        out=out,
        mechanisms=mechanism,
        kernels=tuple(part.strip() for part in (kernel or "").split(",") if part.strip()),
        baselines=not no_baselines,
        preset=preset,
        num_seeds=seeds,
        options={**_given(own), **dict(_pair(text) for text in option or [])},
        data_dir=data_dir,
        train=_given(train),
        model=_given(model),
        device=device,
        resume=resume,
        force=force,
        costs=not no_costs,
        tensorboard=tensorboard,
    )
    try:
        if as_json:
            run(job)
        else:
            with console.Bars() as bars:
                run(job, bars)
    except KeyboardInterrupt:
        if not job.folder.exists():
            raise
        console.error(f"interrupted; what is done is kept in {job.folder}, and the same command with --resume goes on")
        raise SystemExit(console.INTERRUPTED) from None
    if is_main_process():
        _write(load_results(out), out, as_json)


@app.command()
def cost(
    task: Annotated[str, typer.Argument(metavar="TASK", help="One of `maclin arena list`.")],
    mechanism: Annotated[str, typer.Option(help="As in `maclin arena run`.")] = "macformer",
    lengths: Annotated[str | None, typer.Option(help="Positions, by commas. Default: the published length.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences of a step.")] = 4,
    seconds: Annotated[float, typer.Option(help="For the runs of one mechanism at one length.")] = 2.0,
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Directory of runs; what was measured joins their tables.")] = None,
    preset: Annotated[str, typer.Option(help="Of the runs in --out.")] = "quick",
    as_json: _Json = False,
) -> None:
    """Measure what a training step takes in time and memory, beside softmax; needs no data."""
    from ..arena import ArenaJob, costs_path, keep_costs, run_costs
    from ..report import arena as report

    job = ArenaJob(task, Path(), mechanisms=mechanism, preset="standard", train={"precision": precision}, device=device)
    path = None if out is None else costs_path(job.label, out, preset)
    found = run_costs(job, _whole(lengths), batch_size=batch_size, seconds_per_model=seconds)
    if path is not None:
        keep_costs(found, path)
    if as_json:
        rows = [dataclasses.asdict(row) for row in found.costs]
        console.out.print(json.dumps(rows, indent=2), markup=False)
        return
    for made in report.cost_tables(found):
        console.out.print(made.title, markup=False, style="bold")
        console.out.print(_rich(made.columns, made.rows), soft_wrap=False)
        for note in made.notes:
            console.out.print(note, markup=False, soft_wrap=False)
    if path is not None:
        console.out.print(f"Costs: {path}", markup=False, soft_wrap=True)


@app.command()
def table(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Of earlier runs.")] = Path("arena"),
    out: Annotated[Path | None, typer.Option(help="Directory of the tables. Default: that of the runs.")] = None,
    as_json: _Json = False,
) -> None:
    """Make the tables of what was run, finished or not, as HTML, Markdown and JSON."""
    from ..arena import load_results

    _write(load_results(folder), out or folder, as_json)


@app.command(name="list")
def list_(as_json: _Json = False) -> None:
    """Say which tasks there are."""
    from ..arena import task_rows

    rows = task_rows()
    if as_json:
        console.out.print(json.dumps(rows, indent=2, ensure_ascii=False), markup=False)
        return
    body = [[row["name"], row["metric"] or "accuracy", _lengths(row["lengths"]), row["summary"]] for row in rows]
    drawn = _rich(("task", "metric", "length: quick, standard, paper", "what it is"), body)
    console.out.print(drawn, soft_wrap=False)


def _write(found: ArenaResult, out: Path, as_json: bool) -> None:
    from ..report import arena as report

    paths = report.write_arena(found, out)
    findings = report.findings_of(found)
    if as_json:
        summary = {
            "findings": findings,
            "warnings": found.warnings,
            "files": {kind: str(path) for kind, path in paths.items()},
        }
        console.out.print(json.dumps(summary, indent=2, ensure_ascii=False), markup=False)
        return
    for warning in found.warnings:
        console.err.print(f"warning: {warning}", markup=False)
    for result in found.tasks:
        made = report.score_table(result)
        console.out.print(made.title, markup=False, style="bold")
        console.out.print(_rich(made.columns[:_SHOWN], [row[:_SHOWN] for row in made.rows]), soft_wrap=False)
    for sentence in findings:
        console.out.print(f"- {sentence}", markup=False, soft_wrap=False)
    console.out.print(f"Tables: {paths['html']}", markup=False)


def _rich(columns: Any, rows: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for i, name in enumerate(columns):
        drawn.add_column(Text(name), overflow="fold", justify="left" if i == 0 or len(columns) < 5 else "right")
    for row in rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn


def _lengths(lengths: dict[str, int] | None) -> str:
    return "as your data" if lengths is None else ", ".join(f"{length:,}" for length in lengths.values())


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _whole(text: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in (text or "").split(",") if part.strip())
    except ValueError:
        raise OptionError(f"wanted --lengths as whole numbers with commas, such as 2000,4000, got {text!r}") from None


def _pair(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise OptionError(f"wanted --option as name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
