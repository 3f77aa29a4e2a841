"""Tiny converted models, and batches for them."""

import importlib.util
from typing import Any

import pytest
import torch

import maclin

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("accelerate") is None:
    collect_ignore_glob = ["test_*.py"]

HYBRID: dict[str, Any] = {"window": 3, "linear": "hedgehog", "linear_options": {"num_features": 16}}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Patients:
    """Makes converted models and batches."""

    def __init__(self, tiny: Any) -> None:
        self.tiny = tiny

    def model(self, name: str = "bert", mechanism: str = "hybrid", **options: Any) -> Any:
        model = self.tiny.make(name)
        maclin.convert_(model, mechanism, **(options or (HYBRID if mechanism == "hybrid" else {})))
        return model

    def batches(self, number: int = 6, lengths: tuple[int, ...] = (21, 13, 17)) -> list[dict[str, torch.Tensor]]:
        return [self.tiny.batch(lengths, seed=seed) for seed in range(number)]


@pytest.fixture
def patients(tiny: Any) -> Patients:
    return Patients(tiny)
