"""What healing did, as HTML, Markdown and JSON, on disk and back: the page of a study, with the learning curve."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..records import Cell, HealLook, HealResult, Line, LineChart, Study, StudyTable, to_json
from . import words
from .files import check_out_dir, load_record, write_texts
from .study import render_study_html, render_study_markdown

HEAL_NAMES = ("heal.html", "heal.md", "heal.json")
"""The files that ``write_heal`` makes."""

STAGES = {"converted": "as converted", "transfer": "after attention transfer", "distillation": "distillation"}


def heal_study(result: HealResult) -> Study:
    """Healing as a study: findings, learning curve, tables.

    Args:
        result: what came of it; with its environment.

    Raises:
        ValueError: the environment is missing.
    """
    if result.environment is None:
        raise ValueError("wanted a result with its environment, got one without; pass replace(result, environment=...)")
    return Study(
        schema_version=result.schema_version,
        name="healing",
        question="How close is the converted model to its original, before and after healing?",
        findings=heal_findings(result),
        settings={name: value for name, value in result.settings.items() if value is not None},
        environment=result.environment,
        measurements=(),
        tables=(_looks_table(result), _layers_table(result)),
        charts=(learning_curve(result),),
        warnings=result.warnings,
        seconds={"heal": result.seconds},
    )


def heal_findings(result: HealResult) -> tuple[str, ...]:
    """What to know, in sentences made of the figures."""
    found = [
        f"The error on held-out data ({result.measure}) went from {result.error_before:.4g} to {result.error_after:.4g}"
        + (
            f", which is {result.error_before / result.error_after:.1f} times less."
            if 0 < result.error_after < result.error_before
            else "."
        )
    ]
    transfer = next((look for look in result.looks if look.stage == "transfer"), None)
    if transfer is not None:
        found.append(
            f"Attention transfer alone, {words.plural(result.transfer_steps, 'step')}, brought it to "
            f"{transfer.error:.4g}; distillation then had {words.plural(result.distillation_steps, 'step')}."
        )
    if result.metric_before is not None and result.metric_after is not None:
        found.append(f"The task's own metric went from {result.metric_before:.4g} to {result.metric_after:.4g}.")
    where = STAGES.get(result.best_stage, result.best_stage)
    at = f", step {result.best_step}" if result.best_stage == "distillation" else ""
    found.append(f"The model was left as it was best ({where}{at}); healing ended because of: {result.stopped}.")
    return tuple(found)


def learning_curve(result: HealResult) -> LineChart:
    """The held-out error over time; and of the hidden states, where they are compared."""
    looks = result.looks
    lines = [_line(result.measure, [(look.seconds, look.error) for look in looks])]
    if result.measure != "hidden states":
        hidden = [(look.seconds, look.hidden_error) for look in looks if look.hidden_error is not None]
        lines.append(_line("hidden states (relative error)", hidden))
    if any(look.metric is not None for look in looks):
        lines.append(_line("metric", [(look.seconds, look.metric) for look in looks if look.metric is not None]))
    transfer = next((look.seconds for look in looks if look.stage == "transfer"), None)
    note = "" if transfer is None else f"Attention transfer ends, and distillation begins, at {transfer:.0f} s."
    positive = all(y is not None and y > 0 for line in lines for y in line.y)
    return LineChart(
        "Learning curve", "seconds of healing", "error on held-out data", tuple(lines), log_y=positive, note=note
    )


def render_heal_html(result: HealResult) -> str:
    """One self-contained page; all of its text is escaped."""
    return render_study_html(heal_study(result))


def render_heal_markdown(result: HealResult) -> str:
    """The same as Markdown text."""
    return render_study_markdown(heal_study(result))


def write_heal(result: HealResult, out_dir: str | Path) -> dict[str, Path]:
    """Write ``heal.html``, ``heal.md`` and ``heal.json``, replacing earlier ones.

    Args:
        result: what came of healing; with its environment.
        out_dir: directory; made if it is not there.

    Returns:
        The paths by the keys ``html``, ``md`` and ``json``.

    Raises:
        NotADirectoryError, PermissionError: as ``check_out_dir``.
        OSError: no space left, or another failure of the disk; one sentence.
    """
    rendered = (render_heal_html(result), render_heal_markdown(result), to_json(result))
    checked = check_out_dir(out_dir, force=True, names=HEAL_NAMES, noun="report")
    return write_texts(dict(zip(HEAL_NAMES, rendered, strict=True)), checked, noun="report")


def load_heal(path: str | Path) -> HealResult:
    """Read a ``heal.json`` back; raises as ``load_report``."""
    return load_record(HealResult, path, noun="heal")


def _line(name: str, points: Sequence[tuple[float, float | None]]) -> Line:
    return Line(name, tuple(x for x, _ in points), tuple(y for _, y in points))


def _looks_table(result: HealResult) -> StudyTable:
    has_metric = any(look.metric is not None for look in result.looks)

    def row(look: HealLook) -> tuple[Cell, ...]:
        name = STAGES.get(look.stage, look.stage)
        best = "best" if (look.stage, look.step) == (result.best_stage, result.best_step) else ""
        cells: tuple[Cell, ...] = (name, best, look.step, look.seconds, look.error, look.hidden_error, look.train_loss)
        return (*cells, look.metric) if has_metric else cells

    columns = ("Stage", "", "Step", "Seconds", result.measure, "Hidden states", "Training loss")
    return StudyTable(
        "Looks at the held-out batches",
        (*columns, "Metric") if has_metric else columns,
        tuple(map(row, result.looks)),
        f"Means over {result.num_held_out} held-out {'batch' if result.num_held_out == 1 else 'batches'}.",
    )


def _layers_table(result: HealResult) -> StudyTable:
    return StudyTable(
        "Attention transfer, layer by layer",
        ("Layer", "Mechanism", "What was done", "Error before", "Error after"),
        tuple(
            (row.layer, row.mechanism, row.note or "stays as it was", row.error_before, row.error_after)
            for row in result.layers
        ),
        "Relative error of the attention output, the inputs of the layer being the original's.",
    )
