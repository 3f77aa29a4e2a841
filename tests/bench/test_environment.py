from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch

from maclin.bench import environment
from maclin.bench.environment import processor_name
from maclin.records import Environment, from_json, to_json


def test_it_says_where_and_with_what() -> None:
    found = environment(torch.device("cpu"), torch.bfloat16)
    assert abs(datetime.fromisoformat(found.date_utc) - datetime.now(UTC)) < timedelta(minutes=1)
    assert found.torch_version == torch.__version__
    assert found.device == "cpu"
    assert found.dtype == "bfloat16"
    assert found.num_threads == torch.get_num_threads()
    assert found.processor
    assert from_json(Environment, to_json(found)) == found


def test_a_missing_library_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert environment().transformers_version is None


def test_the_processor_as_the_system_names_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name\t: Fast One: 9\nmodel name\t: Other\n")
    assert processor_name(tmp_path / "cpuinfo") == "Fast One: 9"
    assert processor_name(tmp_path / "none")


@pytest.mark.gpu
def test_the_gpu_is_named() -> None:
    found = environment("cuda")
    assert found.device == "cuda:0"
    assert found.processor.startswith(torch.cuda.get_device_name(0))
