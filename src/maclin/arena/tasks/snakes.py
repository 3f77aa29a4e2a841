"""Drawings for Pathfinder: dashed curves that never touch, and two discs on the ends of one or of two of them.

Two snakes of equal length begin a fixed distance apart and grow in turns, dash by dash. The next dash begins a margin
beyond the last; its direction is drawn with weight cos²(min(c |turn|, π/2)) among those in which it stays free of every
other dash by the margin. A dead end discards the whole drawing. Shorter distractors follow by the same rule.

Source: Linsley et al. 2018, in the sizes of Long Range Arena. Deviations: nothing but its own dashes comes within the
margin of a disc, so that the answer can be seen; the grey levels are ours, dashes at 3/4 of the discs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

HEADINGS = 64
_GRID = 4  # cells to a pixel, in the grid that says what is free
_SLACK = 0.25  # pixels that the grid may be wrong by
_TRIES = 5  # for each distractor
_DASH, _DISC = 0.75, 1.0


@dataclass(frozen=True)
class Rules:
    """Sizes of a drawing, all in pixels but the numbers of things.

    Args:
        size: of a side.
        padding: from the border.
        margin: between dashes.
        dash: length of one.
        thickness: of one.
        disc: radius.
        apart: distance between the beginnings of the two snakes.
        length: dashes of a snake.
        distractor_length: dashes of a distractor.
        distractors: at most.
        continuity: c, how much turns are avoided.
        antialias: samples to a pixel, in each direction.
    """

    size: int
    padding: float
    margin: float
    dash: float
    thickness: float
    disc: float
    apart: float
    length: int
    distractor_length: int
    distractors: int
    continuity: float
    antialias: int = 2

    @cached_property
    def turns(self) -> np.ndarray:
        """Weight of each heading after each other one, (HEADINGS, HEADINGS)."""
        angle = np.arange(HEADINGS) * 2 * np.pi / HEADINGS
        turn = np.abs((angle[None] - angle[:, None] + np.pi) % (2 * np.pi) - np.pi)
        return np.cos(np.minimum(self.continuity * turn, np.pi / 2)) ** 2

    @property
    def clearance(self) -> float:
        """From the middle of one dash to that of another."""
        return self.margin + self.thickness + _SLACK

    @property
    def border(self) -> int:
        """Cells around the drawing that are never free, so that nothing is looked up outside."""
        reach = max(self.dash + 2 * self.margin, self.disc) + self.clearance
        return math.ceil(reach * _GRID) + 2

    @property
    def width(self) -> int:
        """Cells of a side, border included."""
        return self.size * _GRID + 2 * self.border

    @cached_property
    def axes(self) -> np.ndarray:
        """Cells of the middle line of a dash and the margin behind it, for each heading: offsets in the flat grid."""
        along = np.arange(0, (self.dash + self.margin) * _GRID + 0.5) / _GRID
        x, y = directions()[:, :, None] * along
        return np.rint(y * _GRID).astype(np.int64) * self.width + np.rint(x * _GRID).astype(np.int64)

    @cached_property
    def blocks(self) -> list[np.ndarray]:
        """Cells that a dash keeps others out of, for each heading: offsets in the flat grid."""
        return [self._near(0, 0, self.dash * x, self.dash * y, self.clearance) for x, y in directions().T]

    @cached_property
    def disc_block(self) -> np.ndarray:
        """Cells that a disc keeps others out of: offsets in the flat grid."""
        return self._near(0, 0, 0, 0, self.disc + self.margin + self.thickness / 2 + _SLACK)

    @cached_property
    def free(self) -> np.ndarray:
        """The flat grid of an empty drawing: 1 where nothing may be."""
        middle = (np.arange(self.width) - self.border + 0.5) / _GRID
        outside = (middle < self.padding) | (middle > self.size - self.padding)
        return (outside[:, None] | outside[None]).astype(np.uint8).ravel()

    def cell(self, x: float, y: float) -> int:
        """The flat grid's cell of a point."""
        return (math.floor(y * _GRID) + self.border) * self.width + math.floor(x * _GRID) + self.border

    def _near(self, x0: float, y0: float, x1: float, y1: float, radius: float) -> np.ndarray:
        reach = math.ceil((max(abs(x1 - x0), abs(y1 - y0)) + radius) * _GRID)
        y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
        ends = np.array([[x0, y0, x1, y1]])
        near = distance(ends, x.ravel()[None] / _GRID, y.ravel()[None] / _GRID)[0] <= radius
        return (y.ravel() * self.width + x.ravel())[near]


@dataclass(frozen=True)
class Drawing:
    """Where everything is, in pixels.

    Args:
        dashes: x and y of both ends of each, (number, 4).
        discs: middles of the two, (2, 2).
        label: whether both are on one snake.
    """

    dashes: np.ndarray
    discs: np.ndarray
    label: int


class _DeadEndError(Exception):
    pass


class _Snake:
    """One snake while it grows; ``grid`` says where it may not go."""

    def __init__(self, rules: Rules, rng: np.random.Generator, grid: np.ndarray, x: float, y: float) -> None:
        self.rules, self.rng, self.grid = rules, rng, grid
        self.start = self.tip = (x, y)
        self.heading: int | None = None
        self.dashes: list[tuple[float, float, float, float]] = []
        self._last: np.ndarray | None = None  # cells of the last dash, which the next one may begin in

    def grow(self) -> np.ndarray:
        """One more dash; the cells that it keeps others out of."""
        rules = self.rules
        x, y = self.tip
        if self.heading is None:
            weight = np.ones(HEADINGS)
        else:
            dx, dy = _DIRECTIONS[self.heading]
            x, y = x + rules.margin * dx, y + rules.margin * dy
            weight = rules.turns[self.heading]
        cell = rules.cell(x, y)
        weight = weight * ~self.grid[cell + rules.axes].any(1)
        summed = weight.cumsum()
        if summed[-1] < 1e-9:
            raise _DeadEndError
        heading = min(int(np.searchsorted(summed, self.rng.random() * summed[-1], side="right")), HEADINGS - 1)
        dx, dy = _DIRECTIONS[heading]
        self.tip, self.heading = (x + rules.dash * dx, y + rules.dash * dy), heading
        self.dashes.append((x, y, *self.tip))
        if self._last is not None:
            self.grid[self._last] = 1
        if len(self.dashes) == 2:
            self.grid[rules.cell(*self.start) + rules.disc_block] = 1
        self._last = cell + rules.blocks[heading]
        return self._last


def draw(rules: Rules, rng: np.random.Generator) -> Drawing:
    """One drawing; those with a dead end are thrown away.

    Args:
        rules: its sizes.
        rng: draws everything, the label included.
    """
    label = int(rng.random() < 0.5)
    first = int(rng.random() < 0.5)
    while True:
        try:
            snakes, grid = _two_snakes(rules, rng)
            break
        except _DeadEndError:
            continue
    dashes = [dash for snake in snakes for dash in snake.dashes]
    for _ in range(rules.distractors):
        dashes += _distractor(rules, rng, grid)
    last = first if label else 1 - first
    return Drawing(np.array(dashes), np.array([snakes[first].start, snakes[last].tip]), label)


def _two_snakes(rules: Rules, rng: np.random.Generator) -> tuple[list[_Snake], np.ndarray]:
    low, high = rules.padding, rules.size - rules.padding
    x, y = low + (high - low) * rng.random(2)
    angle = 2 * np.pi * rng.random()
    points = [(x, y), (x + rules.apart * np.cos(angle), y + rules.apart * np.sin(angle))]
    if not all(low <= value <= high for value in points[1]):
        raise _DeadEndError
    snakes = [_Snake(rules, rng, rules.free.copy(), *point) for point in points]
    for snake, other in (snakes, snakes[::-1]):
        snake.grid[rules.cell(*other.start) + rules.disc_block] = 1
    everything = rules.free.copy()  # what distractors keep out of
    for snake in snakes:
        everything[rules.cell(*snake.start) + rules.disc_block] = 1
    cells = [np.zeros(len(everything), bool), np.zeros(len(everything), bool)]  # of each snake itself
    for _ in range(rules.length):
        for i, snake in enumerate(snakes):
            blocked = snake.grow()
            snakes[1 - i].grid[blocked] = 1
            everything[blocked] = 1
            cells[i][rules.cell(*snake.dashes[-1][:2]) + rules.axes[snake.heading]] = True
    ends = np.array([point for snake in snakes for point in (snake.start, snake.tip)])
    between = np.hypot(*(ends[:, None] - ends[None]).transpose(2, 0, 1)) + 1e9 * np.eye(len(ends))
    if between.min() < 2 * rules.disc + rules.margin:
        raise _DeadEndError  # a disc would touch another
    for i, snake in enumerate(snakes):
        around = rules.cell(*snake.tip) + rules.disc_block
        if cells[1 - i][around].any():
            raise _DeadEndError
        everything[around] = 1
    return snakes, everything


def _distractor(rules: Rules, rng: np.random.Generator, grid: np.ndarray) -> list[tuple[float, float, float, float]]:
    for _ in range(_TRIES):
        trial = grid.copy()
        snake = _Snake(rules, rng, trial, *(rules.size * rng.random(2)))
        try:
            kept = [snake.grow() for _ in range(rules.distractor_length)]
        except _DeadEndError:
            continue
        for blocked in kept:
            grid[blocked] = 1
        return snake.dashes
    return []


def render(rules: Rules, drawing: Drawing, scale: int | None = None) -> np.ndarray:
    """The drawing as grey levels, (size, size) uint8, or larger by ``scale`` without averaging.

    Args:
        rules: its sizes.
        drawing: what to draw.
        scale: samples to a pixel, each of which becomes one; None averages over those of the rules.
    """
    samples = rules.antialias if scale is None else scale
    side = rules.size * samples
    picture = np.zeros(side * side, np.float32)
    ends = np.concatenate([drawing.dashes, np.tile(drawing.discs, 2)])
    half = np.concatenate([np.full(len(drawing.dashes), rules.thickness / 2), np.full(2, rules.disc)])
    level = np.concatenate([np.full(len(drawing.dashes), _DASH), np.full(2, _DISC)])
    reach = math.ceil((max(rules.dash / 2 + rules.thickness / 2, rules.disc) + 1) * samples)
    offset_y, offset_x = (axis.ravel() for axis in np.mgrid[-reach : reach + 1, -reach : reach + 1])
    middle = np.floor((ends[:, :2] + ends[:, 2:]) / 2 * samples).astype(np.int64)
    x, y = middle[:, :1] + offset_x, middle[:, 1:] + offset_y
    gap = distance(ends, (x + 0.5) / samples, (y + 0.5) / samples)
    cover = np.clip(0.5 + (half[:, None] - gap) * samples, 0, 1) * level[:, None]
    inside = (x >= 0) & (x < side) & (y >= 0) & (y < side) & (cover > 0)
    np.maximum.at(picture, (y * side + x)[inside], cover[inside].astype(np.float32))
    picture = picture.reshape(side, side)
    if scale is None:
        picture = picture.reshape(rules.size, samples, rules.size, samples).mean((1, 3))
        picture = picture / picture.max()
    return np.rint(255 * picture).astype(np.uint8)


def distance(ends: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """From points to segments: ends (number, 4), x and y (number or 1, points) to (number, points)."""
    x0, y0, x1, y1 = (ends[:, i : i + 1] for i in range(4))
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((x - x0) * dx + (y - y0) * dy) / np.maximum(dx * dx + dy * dy, 1e-12), 0, 1)
    return np.hypot(x - x0 - along * dx, y - y0 - along * dy)


def directions() -> np.ndarray:
    """x and y of each heading, (2, HEADINGS)."""
    angle = np.arange(HEADINGS) * 2 * np.pi / HEADINGS
    return np.stack([np.cos(angle), np.sin(angle)])


_DIRECTIONS: list[tuple[float, float]] = [(float(x), float(y)) for x, y in directions().T]
