"""The trained part of the projection study: a tiny Transformer on bytes of source code, one run per mode and seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...core.mechanisms import Mechanism, mechanism
from ...core.mechanisms.linformer import Linformer
from ...records import Config
from ..source_text import HELD_OUT_EVERY, PACKAGES, sources, windows
from ..tiny import Task, TinyClassifier, train

if TYPE_CHECKING:
    from . import ProjectionStudy

WIDTH, NUM_HEADS, BATCH, RATE = 64, 2, 32, 4e-3
_CURVE = 20  # points of the curve of losses that is kept


def byte_task(length: int, num_train: int, num_held_out: int, seed: int = 0) -> Task:
    """From which package of the standard library are these bytes of source code? Held-out ones are from other files.

    Bytes, because a window's words alone give its package away, and averaging them is enough then.

    Args:
        length: bytes of a window.
        num_train: windows to train on.
        num_held_out: windows to judge on.
        seed: of the places of the windows.

    Raises:
        InputError: the standard library's source is not installed, or its packages are too small.
    """
    trained: list[list[Tensor]] = []
    held: list[list[Tensor]] = []
    for name in PACKAGES:
        texts = [torch.tensor(list(text.encode()), dtype=torch.int64) for text in sources(name)]
        held.append(texts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
        trained.append([text for i, text in enumerate(texts) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1])
    generator = torch.Generator().manual_seed(seed)
    return Task(
        name="package of source code, by bytes",
        source="source files of the standard library: " + ", ".join(PACKAGES),
        classes=PACKAGES,
        vocab=256,
        train=windows(trained, length, num_train, generator),
        held_out=windows(held, length, num_held_out, generator),
    )


class Trained:
    """Runs of a tiny classifier; one cell for each mechanism, k and seed."""

    def __init__(self, job: ProjectionStudy) -> None:
        self.job = job
        self._task: Task | None = None

    @property
    def task(self) -> Task:
        """Made when it is first asked for."""
        if self._task is None:
            self._task = byte_task(self.job.task_length, self.job.num_train, self.job.num_held_out)
        return self._task

    def cells(self) -> list[Config]:
        """The runs, seed by seed, so that an interrupted study has all of a few seeds."""
        job = self.job
        runs: list[Config] = [
            {"method": name, "projection": None, "sharing": None, "k": None}
            for name in ("softmax", "mean", "efficient", "revisited_linformer")
        ]
        for projection in job.projections:
            for k in job.trained_lens:
                if projection == "learned":
                    sharings = job.trained_sharings if k == job.sharing_len else ("headwise",)
                elif projection == "mean-pool" or k == job.sharing_len:
                    sharings = (None,)
                else:
                    continue
                for sharing in sharings:
                    runs.append({"method": "linformer", "projection": projection, "sharing": sharing, "k": k})
        common = {
            "part": "trained",
            "task_length": job.task_length,
            "num_train": job.num_train,
            "num_held_out": job.num_held_out,
            "num_layers": job.num_layers,
            "steps": job.steps,
        }
        return [{**common, **row, "seed": seed} for seed in range(job.num_seeds) for row in runs]

    def measure(self, key: Config) -> Config:
        """accuracy and loss on held-out windows, the curve of training losses, divergence, seconds."""
        made: list[Mechanism] = []

        def factory(layer: int) -> Mechanism:
            made.append(build(key, made[0] if made else None))
            return made[-1]

        task = self.task
        model = TinyClassifier(
            task.vocab, WIDTH, NUM_HEADS, self.job.num_layers, self.job.task_length, len(task.classes), factory,
            seed=key["seed"],
        )  # fmt: skip
        found = train(model, task, self.job.steps, min(BATCH, len(task.train)), RATE, seed=key["seed"])
        losses = found["losses"]
        size = max(len(losses) // _CURVE, 1)
        return {
            "accuracy": found["accuracy"],
            "held_out_loss": found["held_out_loss"],
            "losses": [sum(losses[i : i + size]) / size for i in range(0, size * (len(losses) // size), size)],
            "diverged_at_step": found["diverged_at_step"],
            "seconds": found["seconds"],
        }


def build(key: Config, first: Mechanism | None) -> Mechanism:
    """The mechanism of a run for one layer; ``first`` is that of the first layer, which "layerwise" shares."""
    sizes = {"head_dim": WIDTH // NUM_HEADS, "num_heads": NUM_HEADS}
    if key["method"] != "linformer":
        return mechanism(key["method"], **sizes)
    options: Config = {"proj_len": key["k"], "projection": key["projection"]}
    if key["projection"] == "learned":
        options |= {"seq_len": key["task_length"], "sharing": key["sharing"]}
        if key["sharing"] == "layerwise" and isinstance(first, Linformer):
            shared: nn.Parameter | None = first.E
            options["shared"] = shared
    return mechanism("linformer", **options, **sizes)
