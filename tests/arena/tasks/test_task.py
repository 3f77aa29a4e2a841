"""Batches, trivial answers, splits, and the registry."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch

from maclin.arena.splits import Labelled, Listed, Ragged, hold_out, longest, sample
from maclin.arena.task import NOT_JUDGED, PRESETS, Field, Kind, Preset, Splits, Task, collate
from maclin.arena.tasks import TASKS, Own, options, task
from maclin.core.errors import InputError, OptionError
from maclin.progress import Progress


class Made(Task):
    """A task whose examples a test gives."""

    name = "made"
    summary = "for tests"

    def __init__(self, kind: Kind, field: Field, classes: int = 3) -> None:
        self.kind = kind  # type: ignore[misc]
        self.field = field
        self.num_classes = classes
        self.presets = {"quick": Preset(4, 4, 1, 1)}

    def _load(self, sizes: Preset, seed: int, progress: Progress) -> Splits:
        raise NotImplementedError


TOKENS = Field("tokens", vocab_size=10)


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_tokens_are_padded_with_a_mask() -> None:
    batch = collate(Made("classify", TOKENS), [{"x": ids(1, 2, 3), "y": 2}, {"x": ids(4), "y": 0}])
    assert batch["x"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch["mask"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["y"].tolist() == [2, 0]
    assert {name: value.dtype for name, value in batch.items()} == {
        "x": torch.int64,
        "mask": torch.bool,
        "y": torch.int64,
    }


def test_values_keep_their_channels_and_a_length_can_be_asked_for() -> None:
    made = Made("classify", Field("values", channels=2))
    examples = [{"x": np.ones((2, 2), np.float32), "y": 1}, {"x": np.ones((3, 2), np.float32), "y": 1}]
    batch = collate(made, examples, length=5)
    assert batch["x"].shape == (2, 5, 2)
    assert batch["x"].dtype == torch.float32
    assert batch["mask"].sum(1).tolist() == [2, 3]
    assert batch["x"][~batch["mask"]].abs().sum() == 0
    with pytest.raises(InputError, match="at most 2 positions, got one of 3"):
        collate(made, examples, length=2)


def test_the_other_kinds_have_their_own_keys() -> None:
    pair = collate(Made("match", TOKENS), [{"x1": ids(1), "x2": ids(2, 3), "y": 1}])
    assert {name: tuple(value.shape) for name, value in pair.items()} == {
        "x1": (1, 1),
        "mask1": (1, 1),
        "x2": (1, 2),
        "mask2": (1, 2),
        "y": (1,),
    }
    tags = collate(Made("tag", TOKENS), [{"x": ids(1, 2), "y": ids(NOT_JUDGED, 5)}, {"x": ids(3), "y": ids(4)}])
    assert tags["y"].tolist() == [[NOT_JUDGED, 5], [4, NOT_JUDGED]]
    both = collate(Made("translate", TOKENS), [{"source": ids(1), "target": ids(2, 3, 4)}])
    assert set(both) == {"source", "source_mask", "target", "target_mask"}
    assert set(collate(Made("language", TOKENS), [{"x": ids(1, 2)}])) == {"x", "mask"}
    with pytest.raises(InputError, match="at least one example"):
        collate(Made("language", TOKENS), [])


def test_trivial_answers() -> None:
    train = Labelled(Ragged.of([ids(1)] * 5), np.array([0, 1, 1, 2, 1]))
    test = Labelled(Ragged.of([ids(1)] * 4), np.array([0, 1, 2, 0]))
    splits = Splits(train, train, test, 1)
    majority = Made("classify", TOKENS).trivial(splits)
    assert (majority.name, majority.value) == ("majority", 0.25)
    assert Made("classify", TOKENS).trivial(splits, train).value == 0.6
    tags = Listed([{"x": ids(1, 1, 1), "y": ids(NOT_JUDGED, 1, 2)}, {"x": ids(1), "y": ids(2)}])
    assert Made("tag", TOKENS).trivial(Splits(tags, tags, tags, 3)).value == pytest.approx(2 / 3)


def test_the_trivial_perplexity_is_that_of_the_frequencies() -> None:
    # predicted tokens of the training split: 1, 1, 2; with one added of 4 ids: 1/7, 3/7, 2/7, 1/7
    train = Listed([{"x": ids(3, 1, 1)}, {"x": ids(3, 2)}])
    test = Listed([{"x": ids(0, 1, 2, 3)}])
    made = Made("language", TOKENS, classes=4)
    expected = (7 / 3 * 7 / 2 * 7 / 1) ** (1 / 3)
    assert made.trivial(Splits(train, train, test, 4)).value == pytest.approx(expected)
    assert not made.higher_is_better


def test_what_is_held_out_has_its_own_seed_and_is_in_one_part_only() -> None:
    train, held = hold_out(100, 10, seed=1)
    assert sorted([*train, *held]) == list(range(100))
    assert len(held) == 10
    assert np.array_equal(held, hold_out(100, 10, seed=1)[1])
    assert not np.array_equal(held, hold_out(100, 10, seed=2)[1])
    groups = [i // 7 for i in range(100)]
    train, held = hold_out(100, 10, seed=1, groups=groups)
    assert len(held) >= 10
    assert not {groups[i] for i in train} & {groups[i] for i in held}
    with pytest.raises(InputError, match="left to train on"):
        hold_out(3, 3, seed=0)


def test_a_sample_is_part_of_the_whole() -> None:
    assert sample(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    assert sample(5, 9, 0).tolist() == [0, 1, 2, 3, 4]
    some = sample(50, 10, 3)
    assert len(set(some.tolist())) == 10
    assert some.tolist() == sorted(some.tolist())


def test_rows_of_any_length() -> None:
    rows = Ragged.of([b"abc", b"", b"d"])
    assert [rows[i].tobytes() for i in range(3)] == [b"abc", b"", b"d"]
    assert rows.lengths.tolist() == [3, 0, 1]
    split = Labelled(rows, np.array([1, 0, 2]), length=2, shift=1).only(np.array([2, 0]))
    assert [split[i]["y"] for i in range(2)] == [2, 1]
    assert np.asarray(split[1]["x"]).tolist() == [98, 99]
    assert longest(split) == 2


@pytest.mark.parametrize("name", [name for name, cls in TASKS.items() if not issubclass(cls, Own)])
def test_every_task_says_what_it_is(name: str) -> None:
    made = task(name)
    assert made.name == name
    assert set(made.presets) == set(PRESETS)
    assert made.presets["quick"].length <= made.presets["standard"].length <= made.presets["paper"].length
    assert (made.field.vocab_size is None) == (made.field.kind == "values")
    assert (made.field.channels is None) == (made.field.kind == "tokens")
    assert made.summary
    with pytest.raises(OptionError, match="quick, standard, paper"):
        made.load("tiny")


def test_unknown_names_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="listops, text"):
        task("lisops")
    with pytest.raises(OptionError, match="wanted options of text among data, length, got size"):
        task("text", size=3)
    with pytest.raises(OptionError, match="wanted data for csv"):
        task("csv")
    assert options("image") == {"size": None}
    assert options("csv")["data"] is inspect.Parameter.empty
    for wrong in ({"name": "text", "data": "imbd"}, {"name": "audio", "length": 0}, {"name": "image", "size": 9}):
        with pytest.raises(OptionError, match="wanted"):
            task(**wrong)
    with pytest.raises(OptionError, match="no official data"):
        task("recall").load("quick", data_dir=tmp_path)
    with pytest.raises(InputError, match="--data-dir"):
        task("image").load("quick", data_dir=tmp_path / "nothing")


def test_labels_of_a_very_long_split_are_counted_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    from maclin.arena import task as room

    monkeypatch.setattr(room, "_ENOUGH", 10)
    # the first half has the label 0, a quarter each 1 and 2
    labels = np.array([0] * 500 + [1] * 250 + [2] * 250)
    split = Labelled(Ragged.of([ids(1)] * 1_000), labels)
    assert Made("classify", TOKENS).trivial(Splits(split, split, split, 1)).value == 0.5
