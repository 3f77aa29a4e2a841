"""Healing that was interrupted goes on and ends in the same bits; kill -9 in earnest, as its own program."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import maclin
from maclin.adopt import HealRecipe
from maclin.adopt.heal import healing
from maclin.core.errors import OptionError
from maclin.progress import Silent

RECIPE = HealRecipe(transfer_steps=18, num_looks=3, lr=1e-3, cache_bytes=1, chunk=2)
PROGRAM = """
import importlib.util, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("tiny_models", sys.argv[1])
parts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(parts)
import maclin
from maclin.adopt import HealRecipe
from maclin.adopt.heal import healing
from maclin.progress import Silent

healing._SAVE_SECONDS = 0.0
healing._SAVE_SHARE = 1e9
folder, pause = Path(sys.argv[2]), float(sys.argv[3])

class Slow(Silent):
    def advance(self, text=""):
        time.sleep(pause)
        with (folder / "steps").open("a") as file:
            file.write(".")

tiny = parts.Tiny()
model = tiny.make("bert")
maclin.convert_(model, "hybrid", window=3, linear="hedgehog", linear_options={"num_features": 16})
batches = [tiny.batch((21, 13, 17), seed=seed) for seed in range(6)]
recipe = HealRecipe(transfer_steps=18, num_looks=3, lr=1e-3, cache_bytes=1, chunk=2)
result = maclin.heal(model, batches, steps=12, recipe=recipe, out=folder, resume=True, progress=Slow())
torch.save([model.state_dict(), result.error_after, len(result.resumed_at_seconds)], folder / "end.pt")
"""
MODELS = Path(__file__).parents[1] / "conftest.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


class StopAfter(Silent):
    """Raises a signal at some step, as Ctrl-C does."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def advance(self, text: str = "") -> None:
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("at", [5, 25])
def test_ctrl_c_keeps_the_best_so_far_and_resuming_ends_in_the_same_bits(
    patients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    whole = patients.model()
    expected = maclin.heal(whole, patients.batches(), steps=12, recipe=RECIPE)
    monkeypatch.setattr(healing, "_SAVE_SECONDS", 0.0)
    broken = patients.model()
    stopped = maclin.heal(broken, patients.batches(), steps=12, recipe=RECIPE, out=tmp_path, progress=StopAfter(at))
    assert stopped.stopped == "interrupted"
    assert stopped.transfer_steps + stopped.distillation_steps == at
    assert stopped.error_after <= stopped.error_before
    again = patients.model()
    result = maclin.heal(again, patients.batches(), steps=12, recipe=RECIPE, out=tmp_path, resume=True)
    assert len(result.resumed_at_seconds) == 1
    assert result.error_after == expected.error_after
    assert [look.error for look in result.looks if look.stage == "distillation"] == [
        look.error for look in expected.looks if look.stage == "distillation"
    ]
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in whole.state_dict().items())


def test_what_is_finished_is_given_back_without_another_step(patients: Any, tmp_path: Path) -> None:
    first, second = patients.model(), patients.model()
    once = maclin.heal(first, patients.batches(), steps=3, recipe=RECIPE, out=tmp_path)
    twice = maclin.heal(second, patients.batches(), steps=3, recipe=RECIPE, out=tmp_path, resume=True)
    assert twice == once
    assert all(torch.equal(x, second.state_dict()[name]) for name, x in first.state_dict().items())


def test_another_healing_is_not_gone_on_with(patients: Any, tmp_path: Path) -> None:
    maclin.heal(patients.model(), patients.batches(), steps=1, recipe=RECIPE, out=tmp_path)
    with pytest.raises(OptionError, match="resume=True"):
        maclin.heal(patients.model(), patients.batches(), steps=1, recipe=RECIPE, out=tmp_path)
    with pytest.raises(OptionError, match="batches"):
        maclin.heal(patients.model(), patients.batches(5), steps=1, recipe=RECIPE, out=tmp_path, resume=True)
    with pytest.raises(OptionError, match="out"):
        maclin.heal(patients.model(), patients.batches(), steps=1, resume=True)
    other = patients.model()
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    before = {name: x.clone() for name, x in other.state_dict().items()}
    with pytest.raises(OptionError, match="model"):
        maclin.heal(other, patients.batches(), steps=1, recipe=RECIPE, out=tmp_path, resume=True)
    assert all(torch.equal(x, before[name]) for name, x in other.state_dict().items())


def test_a_full_disk_leaves_the_best_so_far(patients: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0
    write = healing.save_tensors

    def full(path: Path, tensors: Any) -> None:
        nonlocal written
        written += 1
        if written > 4:
            raise OSError(28, "No space left on device")
        write(path, tensors)

    monkeypatch.setattr(healing, "save_tensors", full)
    model = patients.model()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(OSError, match="No space"):
        maclin.heal(model, patients.batches(), steps=12, recipe=RECIPE, out=tmp_path)
    monkeypatch.undo()
    weights = {n: x for n, x in model.state_dict().items() if "maclin" not in n}
    assert all(torch.equal(x, before[n]) for n, x in weights.items())
    assert all(p.requires_grad for p in model.parameters())


def killed_after(folder: Path, steps: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(MODELS), str(folder), "0.05"]
    marks = folder / "steps"
    marks.unlink(missing_ok=True)
    process = subprocess.Popen(command, env=ENVIRONMENT)
    end = time.monotonic() + 240
    while not marks.exists() or len(marks.read_text()) < steps:
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_healing_killed_three_times_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    folder.mkdir()
    assert subprocess.call([sys.executable, "-c", PROGRAM, str(MODELS), str(whole), "0"], env=ENVIRONMENT) == 0
    for steps in (7, 9, 10):
        killed_after(folder, steps)
        assert not (folder / "end.pt").exists()
    assert subprocess.call([sys.executable, "-c", PROGRAM, str(MODELS), str(folder), "0"], env=ENVIRONMENT) == 0
    ends = [torch.load(path / "end.pt", weights_only=True) for path in (whole, folder)]
    assert all(torch.equal(x, ends[1][0][name]) for name, x in ends[0][0].items())
    assert ends[0][1] == ends[1][1]
    assert ends[1][2] >= 2
