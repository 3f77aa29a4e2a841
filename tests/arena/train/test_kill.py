"""kill -9 in earnest, and several processes: the trainer as its own program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROGRAM = """
import importlib.util, sys, time
from pathlib import Path
import torch

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("parts", sys.argv[1])
parts = importlib.util.module_from_spec(spec)
sys.modules["parts"] = parts
spec.loader.exec_module(parts)
from maclin.training.machine import accelerator_for
from maclin.arena.objective import Objective
from maclin.arena.settings import TrainSettings
from maclin.arena.train import Training, train

folder, pause, dropout = Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4])

def call(model, batch):
    time.sleep(pause)
    return parts.call(model, batch)

task, model = parts.Counting(), parts.Model()
model.dropout.p = dropout
settings = TrainSettings(steps=60, batch_size=8, lr=0.05, save_every=3, evaluate_every=10, log_every=1)
job = Training(model, Objective(task, call), task.load("quick"), settings, 0, folder, {"made": "so"})
accelerator = accelerator_for("fp32", "cpu")
found = train(job, accelerator, resume=True)
if accelerator.is_main_process:
    torch.save([model.state_dict(), found.test_loss, found.test_accuracy, found.best_step], folder / "end.pt")
"""
PARTS = Path(__file__).with_name("conftest.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(folder: Path, pause: float = 0.0, dropout: float = 0.1) -> list[str]:
    return [str(PARTS), str(folder), str(pause), str(dropout)]


def started(folder: Path, pause: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, *command(folder, pause)], env=ENVIRONMENT)


def log(folder: Path) -> list[dict]:
    path = folder / "log.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def killed_after(folder: Path, step: int) -> None:
    """Run until the log tells of a step, then kill -9."""
    process = started(folder, 0.02)
    end = time.monotonic() + 120
    while not any(line["event"] == "train" and line["step"] >= step for line in log(folder)):
        assert process.poll() is None, "it ended before it was killed"
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_a_training_killed_three_times_ends_in_the_same_bits(tmp_path: Path) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    assert started(whole, 0.0).wait() == 0
    for step in (7, 22, 41):
        killed_after(folder, step)
        assert not (folder / "end.pt").exists()
    assert started(folder, 0.0).wait() == 0
    ends = [torch.load(path / "end.pt", weights_only=True) for path in (whole, folder)]
    assert all(torch.equal(value, ends[1][0][name]) for name, value in ends[0][0].items())
    assert ends[0][1:] == ends[1][1:]
    resumed = [line["resumed_at_step"] for line in log(folder) if line["event"] == "resumed"]
    assert len(resumed) == 3
    assert all(at >= step - 3 for at, step in zip(resumed, (7, 22, 41), strict=True))
    losses = [[line["loss"] for line in log(path) if line["event"] == "train"] for path in (whole, folder)]
    assert len(losses[0]) == 60
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    for folder, start in (
        (tmp_path / "one", [sys.executable]),
        (tmp_path / "two", [*launch, "--rdzv-backend", "c10d"]),
    ):
        done = subprocess.run(
            [*start, str(program), *command(folder, dropout=0.0)], env=ENVIRONMENT, capture_output=True, timeout=240
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
    one, two = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("one", "two"))
    for name, value in one[0].items():
        if name != "calls":
            torch.testing.assert_close(two[0][name], value, atol=1e-3, rtol=1e-3)
    assert two[1] == pytest.approx(one[1], abs=1e-3)
    assert log(tmp_path / "two")[0]["num_processes"] == 2
    assert len([line for line in log(tmp_path / "two") if line["event"] == "train"]) == 60
