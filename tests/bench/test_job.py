"""What can be asked of ``maclin bench``, and what cannot."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from maclin.bench import BenchJob
from maclin.core.errors import OptionError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "sped"}, "wanted one of speed, memory, decode, got 'sped'"),
        ({"dtype": "int8"}, "wanted a dtype of float32"),
        ({"lengths": ()}, "lengths of at least 1 token"),
        ({"lengths": (0, 8)}, "lengths of at least 1 token"),
        ({"lengths": (2**31,)}, "wanted fewer than 33,554,432 tokens of width 64, got 2,147,483,648"),
        ({"num_heads": 0}, "num_heads of at least 1"),
        ({"batch": -1}, "batch of at least 1"),
        ({"seconds_per_point": 0.0}, "more than 0 seconds"),
        ({"what": "decode", "backward": True}, "decode has neither backward nor peers"),
        ({"what": "decode", "peers": True}, "decode has neither backward nor peers"),
        ({"mechanisms": "nothing"}, "unknown mechanism 'nothing'"),
        ({"device": "abacus"}, "wanted a device of auto, cpu or cuda, got 'abacus'"),
        ({"device": "meta"}, "for which nothing is measured yet"),
        ({"only_peers": ("performer",)}, "unknown peer 'performer'; known are performer-pytorch"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        BenchJob(**{"device": "cpu", **options})


def test_a_machine_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OptionError, match="sees no CUDA device; pass --device cpu"):
        BenchJob(device="cuda")
    assert BenchJob(device="auto").torch_device.type == "cpu"


def test_by_default_every_mechanism_that_can_do_it() -> None:
    names = [spec.name for spec in BenchJob(device="cpu").specs]
    causal = [spec.name for spec in BenchJob("decode", device="cpu").specs]
    assert "linformer" in names
    assert "linformer" not in causal
    assert "softmax" not in names + causal  # it is the baseline of every run


def test_an_option_that_cannot_be_is_refused_by_name_only() -> None:
    with pytest.raises(OptionError, match="window is 0"):
        BenchJob(mechanisms="window:window=0", device="cpu").built()
    found, reasons = BenchJob(mechanisms="linformer:projection=mean-pool", causal=True, device="cpu").built()
    assert not found
    assert reasons == {"linformer:projection=mean-pool": "linformer has no causal form"}
