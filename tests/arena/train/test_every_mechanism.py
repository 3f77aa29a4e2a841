"""Every mechanism of the registry takes some steps on every task it can do, in both precisions, and stays finite."""

from __future__ import annotations

import pytest
import torch

from maclin.arena import TASKS, tasks
from maclin.arena.costs import random_batch
from maclin.arena.models import build_model, calibrated_, objective_of
from maclin.arena.settings import ModelSettings
from maclin.arena.specs import specs_of
from maclin.core import mechanisms
from maclin.core.errors import CapabilityError

LENGTH, BATCH, STEPS = 40, 8, 3
OWN = ("csv", "jsonl", "npz", "wavdir")  # need a file
MECHANISMS = [name for name in mechanisms.names() if name != "by_head"]  # which needs a plan
CAUSAL_ONLY = {"recall", "language"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TASKS if name not in OWN])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_some_steps_stay_finite(mechanism: str, name: str) -> None:
    task = tasks.task(name)
    objective = objective_of(task)
    batch = random_batch(task, LENGTH, BATCH)
    (spec,) = specs_of(mechanism, baselines=False)
    for precision in (torch.float32, torch.bfloat16):
        try:
            model = build_model(task, spec, ModelSettings(dropout=0.1), LENGTH, 0)
        except CapabilityError:
            # only where tokens must not see what comes, or where positions of two sequences are compared
            assert name in CAUSAL_ONLY | {"translation"}
            assert not mechanisms.row(mechanism).causal or name == "translation"
            return
        calibrated_(model, batch)
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses: list[float] = []
        for _ in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                loss = objective(model, batch).loss / BATCH
            loss.backward()
            assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert torch.tensor(losses).isfinite().all()
        assert losses[-1] < losses[0]  # on a batch that is seen again and again
