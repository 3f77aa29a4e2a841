"""The metrics and the data of the models, on numbers that are made up."""

import importlib
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

minilm: Any = importlib.import_module("models.minilm")
rxnmapper: Any = importlib.import_module("models.rxnmapper")
smollm: Any = importlib.import_module("models.smollm")
texts: Any = importlib.import_module("models.texts")
vit: Any = importlib.import_module("models.vit")
whisper: Any = importlib.import_module("models.whisper")


def test_same_neighbour_counts_documents_whose_nearest_stayed() -> None:
    before = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert minilm.same_neighbour(before, 3 * before) == 1.0
    after = before.clone()
    after[1] = torch.tensor([0.1, 0.9])  # between the last two: it and the last have another nearest now
    assert minilm.same_neighbour(before, after) == 0.5


def test_lengths_are_counted_in_their_bucket() -> None:
    found = minilm.by_length(torch.tensor([0.5, 0.7, 1.0, 0.9]), (256, 319, 512, 384))
    assert {name: count for name, (_, count) in found.items()} == {"256-319": 2, "384-511": 1, "512": 1}
    assert found["256-319"][0] == pytest.approx(0.6)


def test_the_nearest_centroid() -> None:
    rows = [texts.Text(f"{i}", "", label) for i, label in enumerate("aabb")]
    data = minilm.Newsgroups(tuple(rows), tuple(rows[1:3]))
    train = torch.tensor([[1.0, 0.0], [0.8, 0.2], [0.0, 1.0], [0.1, 2.0]])
    assert minilm.centroid_accuracy(train, torch.tensor([[5.0, 1.0], [1.0, 1.5]]), data) == 1.0
    assert minilm.centroid_accuracy(train, torch.tensor([[1.0, 5.0], [1.0, 1.5]]), data) == 0.5


@pytest.mark.parametrize(("text", "word"), [(" 4.", "four"), (" Zero.", "zero"), ("May!", "may"), (" 14", "14")])
def test_what_was_spoken(text: str, word: str) -> None:
    assert whisper.spoken(text) == word


def test_words_right() -> None:
    assert len(whisper.WORDS) == 29
    heard = {name: f" {word.title()}." for name, word in whisper.WORDS.items()}
    assert whisper.right(heard) == 29
    assert whisper.right({**heard, "digits/3": "tree", "digits/day-0": " Monday."}) == 27


@pytest.mark.parametrize("length", [400, 401])
def test_twice_the_rate_is_the_same_sound(length: int) -> None:
    t = np.arange(length)
    tone = np.sin(2 * np.pi * 20 * t / length) + 0.3 * np.cos(2 * np.pi * 57 * t / length)
    made = whisper.doubled(tone)
    np.testing.assert_allclose(made[::2], tone, atol=1e-12)
    fine = np.arange(2 * length) / 2
    wanted = np.sin(2 * np.pi * 20 * fine / length) + 0.3 * np.cos(2 * np.pi * 57 * fine / length)
    np.testing.assert_allclose(made, wanted, atol=1e-12)


def test_nothing_that_is_judged_is_healed_on_in_speech() -> None:
    generator = np.random.default_rng(0)
    judged = {name: np.full(8_000, 7.0) for name in whisper.WORDS}
    others = {f"vm-{i}": generator.uniform(0.1, 1, int(generator.uniform(6_000, 60_000))) for i in range(40)}
    made = whisper.healing_sounds({**judged, **others}, (2.5, 28.0), seed=0)
    assert all(0 < len(x) <= seconds * 16_000 and x.max() < 7 for x, seconds in zip(made, (2.5, 28.0), strict=True))
    assert len(made[1]) > 20 * 16_000


def test_correlation_of_maps() -> None:
    a = torch.rand(2, 5, 5)
    found = vit.correlations(a, torch.stack([3 * a[0] + 1, -a[1]]))
    torch.testing.assert_close(found, torch.tensor([1.0, -1.0], dtype=torch.float64))
    b = torch.rand(2, 5, 5)
    wanted = np.corrcoef(a[0].flatten().numpy(), b[0].flatten().numpy())[0, 1]
    assert float(vit.correlations(a, b)[0]) == pytest.approx(wanted)


def test_files_are_in_one_part_only_and_their_words_decide_the_order() -> None:
    names = [f"kernel:{i}.rst" for i in range(400)]
    share = sum(map(texts.judged, names)) / len(names)
    assert 0.15 < share < 0.35
    rows = [texts.Text(name, f"words {i % 300}") for i, name in enumerate(names)]
    drawn = texts.drawn(rows, 50)
    assert len({row.text for row in drawn}) == 50
    assert [row.text for row in texts.drawn(rows[::-1], 50)] == [row.text for row in drawn]
    assert texts.fingerprint(["a", "b"]) != texts.fingerprint(["ab"])


def test_reactions_know_where_their_atoms_came_from() -> None:
    judged, learned = rxnmapper.reactions(True), rxnmapper.reactions(False)
    assert not {x.smiles for x in judged} & {x.smiles for x in learned}
    for reaction in judged + learned:
        words = ["[CLS]", *rxnmapper.tokens(reaction.smiles), "[SEP]"]
        arrow = words.index(">>")
        assert len(set(reaction.origins.values())) == len(reaction.origins)
        for place, origin in reaction.origins.items():
            assert origin < arrow < place
            assert words[place] == words[origin]
    assert rxnmapper.agreement([{1: 2, 3: 4}], [{1: 2, 3: 5}]) == 0.5


def test_rows_of_rotated_pairs_are_put_in_halves() -> None:
    weight = torch.arange(16.0).view(8, 2)  # two heads of four: pairs (0, 1) and (2, 3) become 0, 2, 1, 3
    made = smollm._halves(weight, 2)
    assert made[:, 0].tolist() == [0, 4, 2, 6, 8, 12, 10, 14]


def test_bytes_of_a_cache_count_every_storage_once() -> None:
    x = torch.zeros(10)
    holder: Any = SimpleNamespace()
    holder.state, holder.view, holder.deep = (x, None), x[2:], {"a": [torch.zeros(3, dtype=torch.float64)]}
    assert smollm.cache_bytes(holder) == 40 + 24
