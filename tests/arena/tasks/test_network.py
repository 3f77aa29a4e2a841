"""The real packages: what they hold is what the tasks say, and a simple look at it finds its labels."""

from pathlib import Path

import numpy as np
import pytest

from maclin.arena.task import Split, collate
from maclin.arena.tasks import task

pytestmark = [pytest.mark.network, pytest.mark.slow]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(autouse=True)
def cache(kept: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all tests of this file."""
    monkeypatch.setenv("MACLIN_CACHE", str(kept))
    return kept


SIZES = {
    "text": (11_286, 7_527, 20),
    "image": (60_000, 10_000, 10),
    "sensors": (537, 537, 11),
    "retrieval": (None, None, 2),
    "audio": (None, None, 5),
    "translation": (None, None, 259),
    "language": (None, None, 257),
}


@pytest.mark.parametrize("name", list(SIZES))
def test_the_whole_task(name: str) -> None:
    made = task(name)
    splits = made.load("standard")
    known, judged, classes = SIZES[name]
    assert made.num_classes == classes
    assert known is None or abs(len(splits.train) + len(splits.valid) - known) < 40
    assert judged is None or abs(len(splits.test) - judged) < 40
    assert min(len(splits.train), len(splits.valid), len(splits.test)) >= 100
    batch = collate(made, [splits.train[i] for i in range(8)])
    for value in batch.values():
        assert value.shape[0] == 8
    if made.field.kind == "tokens":
        assert made.field.vocab_size is not None
        assert all(batch[key].max() < made.field.vocab_size for key in batch if key in ("x", "x1", "x2", "source"))


@pytest.mark.parametrize(("name", "options"), [("text", {"data": "brown"}), ("sensors", {"data": "ACSF1"})])
def test_the_other_data(name: str, options: dict[str, str]) -> None:
    made = task(name, **options)
    splits = made.load("standard")
    labels = {int(splits.test[i]["y"]) for i in range(len(splits.test))}
    assert labels == set(range(made.num_classes))


def spectra(split: Split, number: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [split[i * len(split) // number] for i in range(number)]
    power = np.stack([np.abs(np.fft.rfft(np.asarray(row["x"])[:, 0])) ** 2 for row in rows])
    return np.log(power[:, 1:3841].reshape(len(rows), 40, -1).mean(2) + 1e-3), np.array([row["y"] for row in rows])


def test_a_linear_look_at_the_spectrum_finds_the_voice() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    splits = task("audio").load("standard")
    x, y = spectra(splits.train, 2_000)
    test_x, test_y = spectra(splits.test, 500)
    mean, spread = x.mean(0), x.std(0)
    fitted = linear.LogisticRegression(max_iter=1_000).fit((x - mean) / spread, y)
    assert fitted.score((test_x - mean) / spread, test_y) > 0.75


def test_a_linear_look_at_the_pixels_finds_the_garment() -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    splits = task("image", size=16).load("quick")
    parts = [
        (np.stack([np.asarray(part[i]["x"]) for i in range(1_000)]) / 256, [part[i]["y"] for i in range(1_000)])
        for part in (splits.train, splits.test)
    ]
    fitted = linear.LogisticRegression(max_iter=300, C=0.1).fit(*parts[0])
    assert fitted.score(*parts[1]) > 0.7
