"""What every row of benchmarks/adopt.py is given and gives back, and how an interrupted run goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import maclin
from maclin.adopt.heal import HealRecipe
from maclin.bench import Target, commit, environment
from maclin.files import write_whole
from maclin.progress import Progress

from .subjects import Batch, Subject

ROOT = Path(__file__).resolve().parents[2]
_SHARE = 0.95  # of the minutes; the step and the look that are under way at their end come on top


@dataclass
class Outcome:
    """What a row found.

    Attributes:
        targets: one or more lines of the table.
        figures: everything else that was measured, as JSON values; data and seeds included.
    """

    targets: list[Target]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass
class Job:
    """How to measure.

    Args:
        work: folder of what is kept between runs: finished rows, healing that was interrupted, healed models.
        minutes_scale: factor of all healing times; the targets are meant at 1.
        quick: fewer documents and shorter measurements, to see that everything runs.
        fresh: measure what is there already again.
        progress: is told what goes on.
    """

    work: Path
    minutes_scale: float
    quick: bool
    fresh: bool
    progress: Progress

    def few(self, number: int, quick: int) -> int:
        """A number of documents or runs, or the one of a quick run."""
        return quick if self.quick else number

    def minutes(self, wanted: float) -> float:
        """A healing time."""
        return wanted * self.minutes_scale

    def say(self, text: str) -> None:
        """Something worth knowing while it runs."""
        self.progress.advance(text)

    def folder(self, row: str) -> Path:
        """Where a row keeps what it may go on from."""
        path = self.work / f"{row}-x{self.minutes_scale:g}{'-quick' if self.quick else ''}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def row(self, name: str, measure: Callable[[Job], Outcome]) -> dict[str, Any]:
        """What a row found: from an earlier run, or measured now and kept.

        Args:
            name: of the row.
            measure: measures it.
        """
        path = self.folder(name) / "row.json"
        if not self.fresh and path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            self.say(f"{name}: measured at {found['environment']['date_utc']}")
            return found
        start = time.perf_counter()
        outcome = measure(self)
        found = {
            "row": name,
            "targets": [dataclasses.asdict(target) for target in outcome.targets],
            "figures": outcome.figures,
            "seconds": round(time.perf_counter() - start, 1),
            "minutes_scale": self.minutes_scale,
            "quick": self.quick,
            "environment": dataclasses.asdict(environment()),
            "commit": commit(ROOT),
        }
        write_whole(path, json.dumps(found, indent=2, ensure_ascii=False).encode())
        return found


@dataclass(frozen=True)
class Healing:
    """A healing that is to be done.

    Args:
        minutes: of wall time at most, everything included.
        batches: of learned documents.
        held_out: of them, how many are kept apart to choose by.
        recipe: what differs from the defaults of ``maclin.HealRecipe``.
        train: which weights.
    """

    minutes: float
    batches: int
    held_out: int
    recipe: Mapping[str, Any] = field(default_factory=dict)
    train: Literal["all", "low_rank", "features"] = "all"


def healed(
    job: Job,
    row: str,
    subject: Subject,
    choices: Mapping[str, tuple[str, dict[str, Any]]],
    healing: Healing,
    calibrated_on: int,
) -> dict[str, Any]:
    """Convert layers, heal them within the minutes, and keep the model; what healing recorded, as JSON values.

    An interrupted healing goes on where it was; one that is done is only put back. The documents that are judged by
    are not touched.

    Args:
        job: how.
        row: whose folder it is kept in.
        subject: the model.
        choices: from layer name to mechanism and configuration.
        healing: how long and on what.
        calibrated_on: of the learned batches, that what is chosen from data is chosen on.
    """
    folder = job.folder(row)
    saved = folder / "healed"
    batches = subject.learned(job.few(healing.batches, 6))
    apart = min(healing.held_out, len(batches) // 3)
    learned, held_out = batches[apart:], batches[:apart]
    learned_digest = digest(batches)
    if not job.fresh and (saved / "record.json").is_file():
        maclin.load_converted(saved, subject.root)
        return json.loads((saved / "record.json").read_text(encoding="utf-8"))
    if job.fresh:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    maclin.convert_(subject.root, dict(choices), batches=learned[:calibrated_on])
    start = time.perf_counter()
    record = maclin.heal(
        subject.root,
        learned,
        held_out,
        budget_minutes=_SHARE * job.minutes(healing.minutes),
        train=healing.train,
        out=folder / "healing",
        resume=not job.fresh,
        progress=job.progress,
        recipe=HealRecipe(**healing.recipe),
    )
    figures = {
        "minutes_allowed": job.minutes(healing.minutes),
        "minutes_taken": (time.perf_counter() - start) / 60,
        "batches": len(learned),
        "batches_to_choose_by": len(held_out),
        "learned_digest": learned_digest,
        "recipe": dict(healing.recipe),
        "record": _plain(record),
    }
    maclin.save_converted(subject.root, saved)
    write_whole(saved / "record.json", json.dumps(figures, indent=2).encode())
    return figures


def digest(batches: Sequence[Batch]) -> str:
    """SHA-256 over the numbers of batches, 16 digits."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            found.update(name.encode())
            found.update(batch[name].contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over all weights and buffers, 16 digits."""
    found = hashlib.sha256()
    for name, x in model.state_dict().items():
        found.update(name.encode())
        found.update(x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def _plain(record: object) -> Any:
    """A record as JSON values; whatever is none, by its words."""
    given = dataclasses.asdict(record) if dataclasses.is_dataclass(record) and not isinstance(record, type) else record
    return json.loads(json.dumps(given, default=str))
