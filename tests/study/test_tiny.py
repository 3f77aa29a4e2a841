"""The tiny classifier learns, repeats itself, ignores padding, and says when it diverges."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import maclin
from maclin.core.errors import OptionError
from maclin.core.mechanisms import Mechanism
from maclin.study.tiny import Examples, Task, TinyClassifier, evaluate, train


def softmax(layer: int) -> Mechanism:
    return maclin.mechanism("softmax", head_dim=4, num_heads=2)


def rfa(layer: int) -> Mechanism:
    return maclin.mechanism("rfa", head_dim=4, num_heads=2, num_features=8)


def model(factory=softmax, seed: int = 0, layers: int = 1) -> TinyClassifier:
    return TinyClassifier(10, 8, 2, layers, 12, 2, factory, seed)


def task(number: int = 64) -> Task:
    """Whether id 0 occurs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 10, (number, 12), generator=generator)
    labels = torch.arange(number) % 2
    ids[labels == 1, 3] = 0
    half = number // 2
    return Task(
        "zero", "made", ("no", "yes"), 10, Examples(ids[:half], labels[:half]), Examples(ids[half:], labels[half:])
    )


def test_it_learns_and_repeats_itself() -> None:
    runs = [train(model(seed=1), task(), 80, batch_size=16, lr=3e-2, seed=2) for _ in range(2)]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1]
    assert runs[0]["accuracy"] > 0.95
    assert runs[0]["losses"][-1] < 0.1 < runs[0]["losses"][0]
    assert runs[0]["num_steps"] == len(runs[0]["losses"]) == 80
    assert runs[0]["diverged_at_step"] is None
    other = train(model(seed=1), task(), 80, batch_size=16, lr=3e-2, seed=3)
    assert other["losses"] != runs[0]["losses"]


def test_looks_on_the_way_do_not_change_the_training() -> None:
    plain = train(model(), task(), 12, batch_size=16, lr=1e-2)
    told: list[int] = []
    looked = train(model(), task(), 12, 16, 1e-2, evaluate_every=4, on_step=lambda step, loss: told.append(step))
    assert plain["losses"] == looked["losses"]
    assert [look["step"] for look in looked["held_out"]] == [4, 8, 12]
    assert looked["held_out"][-1]["accuracy"] == plain["accuracy"]
    assert told == list(range(12))


def test_the_other_weights_do_not_depend_on_the_mechanism() -> None:
    first = dict(model(softmax, layers=2).named_parameters())
    second = dict(model(rfa, layers=2).named_parameters())
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["tokens.weight"], dict(model(seed=1, layers=2).named_parameters())["tokens.weight"])


def test_a_mechanism_that_draws_draws_from_the_seed_and_the_global_state_is_left_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    drawn = [m.state_dict() for m in (model(rfa, 0), model(rfa, 0), model(rfa, 1))]
    assert torch.equal(torch.get_rng_state(), before)
    name = "layers.0.attention.mechanism.frequencies"
    assert torch.equal(drawn[0][name], drawn[1][name])
    assert not torch.equal(drawn[0][name], drawn[2][name])


def test_padding_changes_nothing() -> None:
    built = model(layers=2).eval()
    ids = torch.randint(0, 10, (3, 7))
    padded = torch.cat([ids, torch.full((3, 5), 9)], dim=1)
    mask = torch.arange(12).expand(3, 12) < 7
    with torch.no_grad():
        torch.testing.assert_close(built(padded, mask), built(ids))
        assert not torch.allclose(built(padded), built(ids))


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_divergence_is_reported_and_not_raised() -> None:
    built = model()

    def spoil(step: int, loss: float) -> None:
        if step == 2:
            with torch.no_grad():
                built.answer.weight.fill_(torch.nan)

    found = train(built, task(), 10, 16, 1e-3, on_step=spoil)
    assert (found["diverged_at_step"], found["num_steps"]) == (3, 3)
    assert found["accuracy"] is None
    assert found["held_out_loss"] is None
    late = train(model(), task(), 3, 16, 1e-3, on_step=lambda step, loss: None)
    assert late["diverged_at_step"] is None
    assert evaluate(built, task().held_out) == {"accuracy": None, "loss": None}


def test_gradients_are_clipped_to_the_norm_and_reported_before() -> None:
    seen: list[float] = []
    built = model()

    def norm(step: int, loss: float) -> None:
        seen.append(float(nn.utils.get_total_norm([p.grad for p in built.parameters() if p.grad is not None])))

    found = train(built, task(), 4, 16, 1e-3, clip=1e-3, on_step=norm)
    assert max(seen) == pytest.approx(1e-3, rel=1e-3)
    assert found["max_grad_norm"] > 0.01


def test_the_majority_is_that_of_training() -> None:
    labels = torch.tensor([0, 0, 1])
    examples = Examples(torch.zeros(3, 2, dtype=torch.int64), labels)
    held = examples.take(torch.tensor([1, 2]))
    assert Task("t", "s", ("a", "b"), 5, examples, held).majority_accuracy == 0.5
    assert held.labels.tolist() == [0, 1]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(OptionError, match="not a multiple"):
        TinyClassifier(10, 9, 2, 1, 12, 2, softmax)
    with pytest.raises(OptionError, match="wanted 2 heads of 8"):
        TinyClassifier(10, 16, 2, 1, 12, 2, softmax)
    with pytest.raises(OptionError, match="batch of 1 to 32"):
        train(model(), task(), 1, batch_size=33)
    with pytest.raises(OptionError, match="at least 1 step"):
        train(model(), task(), 0)
