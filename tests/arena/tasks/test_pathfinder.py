"""The label of a drawing against what a flood reaches in the drawing, and the rules against its geometry."""

from collections import deque
from dataclasses import replace

import numpy as np
import pytest

from maclin.arena.task import Preset
from maclin.arena.tasks import pathfinder, task
from maclin.arena.tasks.pathfinder import RULES, generate
from maclin.arena.tasks.snakes import Drawing, Rules, distance, draw, render
from maclin.progress import Silent

SCALE = 8


def joined(rules: Rules, drawing: Drawing) -> bool:
    """Whether a flood from one disc reaches the other, over gaps of a margin and no more.

    The picture is drawn eight times as large; what is within half a margin of anything white counts as white.
    """
    picture = render(rules, drawing, SCALE) > 127
    reach = round((rules.margin - rules.thickness / 2) / 2 * SCALE)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    grown = np.zeros((picture.shape[0] + 2 * reach, picture.shape[1] + 2 * reach), bool)
    for dy, dx in zip(y[np.hypot(y, x) <= reach] + reach, x[np.hypot(y, x) <= reach] + reach, strict=True):
        grown[dy : dy + picture.shape[0], dx : dx + picture.shape[1]] |= picture
    start, end = ((disc[::-1] * SCALE).astype(int) + reach for disc in drawing.discs)
    flood = np.zeros_like(grown)
    queue = deque([tuple(start)])
    flood[tuple(start)] = True
    while queue:
        row, column = queue.popleft()
        for near in ((row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)):
            if 0 <= near[0] < grown.shape[0] and 0 <= near[1] < grown.shape[1] and grown[near] and not flood[near]:
                flood[near] = True
                queue.append(near)
    return bool(flood[tuple(end)])


@pytest.mark.parametrize("size", [16, 32])
def test_labels_agree_with_a_flood(size: int) -> None:
    rng = np.random.default_rng(1)
    drawings = [draw(RULES[size], rng) for _ in range(25)]
    assert [joined(RULES[size], drawing) for drawing in drawings] == [bool(d.label) for d in drawings]
    assert len({drawing.label for drawing in drawings}) == 2


@pytest.mark.slow
def test_labels_of_a_thousand_drawings_agree_with_a_flood() -> None:
    rng = np.random.default_rng(2)
    drawings = [draw(RULES[32], rng) for _ in range(1_000)]
    assert [joined(RULES[32], drawing) for drawing in drawings] == [bool(d.label) for d in drawings]
    assert 0.45 < np.mean([drawing.label for drawing in drawings]) < 0.55


@pytest.mark.slow
def test_labels_of_large_drawings_agree_with_a_flood() -> None:
    rng = np.random.default_rng(3)
    drawings = [draw(RULES[128], rng) for _ in range(20)]
    assert [joined(RULES[128], drawing) for drawing in drawings] == [bool(d.label) for d in drawings]


def test_the_flood_sees_a_wrong_label() -> None:
    rng = np.random.default_rng(4)
    drawing = next(d for d in iter(lambda: draw(RULES[32], rng), None) if d.label)
    # without the dash in the middle of its curve, one disc is cut off from the other
    first = np.abs(drawing.dashes[:14, :2] - drawing.discs[0]).sum(1).min() < 1e-9
    index = 7 if first else 14 + 7
    assert joined(RULES[32], drawing)
    assert not joined(RULES[32], replace(drawing, dashes=np.delete(drawing.dashes, index, 0)))


@pytest.mark.parametrize("size", [16, 32, 128])
def test_dashes_keep_the_rules(size: int) -> None:
    rules = RULES[size]
    rng = np.random.default_rng(5)
    for _ in range(5):
        drawing = draw(rules, rng)
        dashes, length, short = drawing.dashes, rules.length, rules.distractor_length
        snakes = [dashes[:length], dashes[length : 2 * length]]
        assert np.isclose(np.hypot(*(snakes[0][0, :2] - snakes[1][0, :2])), rules.apart)
        for snake in snakes:
            along = snake[:, 2:] - snake[:, :2]
            assert np.allclose(np.hypot(*along.T), rules.dash)
            gaps = snake[1:, :2] - snake[:-1, 2:]
            assert np.allclose(np.hypot(*gaps.T), rules.margin)
            angle = np.arctan2(along[:, 1], along[:, 0])
            turn = np.abs((np.diff(angle) + np.pi) % (2 * np.pi) - np.pi)
            assert turn.max() * rules.continuity < np.pi / 2
        assert dashes.min() >= rules.padding - 0.25
        assert dashes.max() <= rules.size - rules.padding + 0.25
        # what is not of one curve is apart by more than a margin
        steps = np.linspace(0, 1, 21)
        points = dashes[:, None, :2] + steps[:, None] * (dashes[:, None, 2:] - dashes[:, None, :2])
        owner = np.concatenate([[0] * length, [1] * length, 2 + np.arange(len(dashes) - 2 * length) // short])
        for i in range(len(dashes)):
            gap = distance(dashes, points[i, None, :, 0], points[i, None, :, 1]).min(1) - rules.thickness
            assert gap[owner != owner[i]].min() > rules.margin


def test_distance_to_a_segment() -> None:
    segment = np.array([[0.0, 0.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    x, y = np.array([[1.0, 3.0, -3.0]]), np.array([[2.0, 0.0, 4.0]])
    assert np.allclose(distance(segment, x, y), [[2, 1, 5], [1, np.sqrt(5), 5]])


def test_an_interrupted_job_goes_on_and_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "_CHUNK", 4)
    whole = generate(RULES[16], 10, 7, Silent())
    calls = []
    original = pathfinder._chunk

    def counted(rules: Rules, seed: int, chunk: int) -> dict[str, np.ndarray]:
        calls.append(chunk)
        return original(rules, seed, chunk)

    monkeypatch.setattr(pathfinder, "_chunk", counted)
    more = generate(RULES[16], 13, 7, Silent())
    assert calls == [3]
    assert all(np.array_equal(a, b[:10]) for a, b in zip(whole, more, strict=True))
    assert whole[0].dtype == np.uint8
    assert whole[0].max() == 255


def test_pixels_are_shifted_away_from_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pathfinder, "_CHUNK", 30)
    made = task("pathfinder")
    made.presets = {"quick": Preset(256, 20, 5, 5)}
    splits = made.load("quick")
    x = splits.train[0]["x"]
    assert isinstance(x, np.ndarray)
    assert (len(x), x.min(), x.max()) == (256, 1, 256)
    assert any("our own small version" in note for note in splits.notes)
