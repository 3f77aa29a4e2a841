"""Generation: the same tokens as without a state, a state that does not grow, padding, sampling, the end."""

from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.nn import MacformerConfig, MacformerLM, MacformerSeq2Seq
from maclin.nn.generation import choose

CAUSAL = [name for name in maclin.mechanisms.names() if maclin.mechanisms.row(name).causal]


def config(mechanism: str = "macformer", **options: Any) -> MacformerConfig:
    sizes = {"vocab_size": 40, "embed_dim": 16, "ff_dim": 24, "max_length": 30}
    return MacformerConfig(**{**sizes, "mechanism": mechanism, **options})


def ids(*shape: int) -> Tensor:
    return torch.randint(1, 40, shape)


def greedy(scores: Tensor) -> Tensor:
    return scores[:, 1:].argmax(-1, keepdim=True) + 1  # 0 is padding


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "learned"])
@pytest.mark.parametrize("name", CAUSAL)
def test_tokens_are_those_of_whole_passes(name: str, position: str) -> None:
    if position == "rotary" and name in ("mean", "elu", "efficient"):
        position = "none"
    options = {"options": {"window": 4}} if name == "window" else {}
    model = MacformerLM(config(name, position=position, **options)).double()
    x = ids(3, 7)
    made = model.generate(x, max_new_tokens=8)
    assert model.training, "the mode is as it was"
    model.eval()
    with torch.no_grad():
        for _ in range(8):
            x = torch.cat([x, greedy(model(x).logits[:, -1])], dim=1)
    assert torch.equal(made, x[:, 7:])


@pytest.mark.parametrize("position", ["sinusoidal", "rotary", "learned"])
@pytest.mark.parametrize("name", ["macformer", "window", "softmax"])
def test_padding_on_the_left_changes_no_token(name: str, position: str) -> None:
    model = MacformerLM(config(name, position=position)).double()
    long, short = ids(1, 9), ids(1, 4)
    together = torch.cat([long, torch.cat([ids(1, 5), short], dim=1)])
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :5] = False
    made = model.generate(together, mask, max_new_tokens=6)
    assert torch.equal(made[:1], model.generate(long, max_new_tokens=6))
    assert torch.equal(made[1:], model.generate(short, max_new_tokens=6))


@pytest.mark.parametrize("name", [name for name in CAUSAL if maclin.mechanisms.row(name).linear])
def test_the_memory_of_a_token_does_not_grow(name: str) -> None:
    model = MacformerLM(config(name, **({"options": {"window": 3}} if name == "window" else {}))).eval()

    def numbers(length: int) -> int:
        state = model(ids(2, length), return_state=True).state
        assert state is not None
        assert state.lengths.tolist() == [length] * 2
        return sum(part.numel() for layer in state.layers for part in layer)

    if name == "hybrid":
        pytest.skip("its window is longer than these sequences")
    assert numbers(5) == numbers(25)


def test_chunks_give_the_same_as_the_whole() -> None:
    model = MacformerLM(config("macformer", position="rotary")).eval()
    x = ids(2, 20)
    whole, state, parts = model(x).logits, None, []
    for start, stop in ((0, 7), (7, 8), (8, 20)):
        made = model(x[:, start:stop], state=state, return_state=True)
        parts.append(made.logits)
        state = made.state
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_rows_of_a_state_can_be_reordered() -> None:
    model = MacformerLM(config("favor")).eval()
    x, y = ids(3, 6), ids(3, 2)
    rows = torch.tensor([2, 0, 0])
    state = model(x, return_state=True).state
    assert state is not None
    got = model(y, state=state.select(rows)).logits
    wanted = model(torch.cat([x[rows], y], dim=1)).logits[:, 6:]
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name not in ("window", "hybrid")])
def test_an_encoder_decoder_makes_what_whole_passes_make(name: str) -> None:
    model = MacformerSeq2Seq(config(name, position="learned", max_length=12, target_vocab_size=25)).double()
    with torch.no_grad():
        for name, attention in model.attentions():
            if name.endswith("multihead_attn"):
                attention.out_proj.weight.mul_(20.0)  # so that tokens hang on the source
    source = ids(3, 12)
    mask = torch.arange(12)[None] < torch.tensor([[12], [7], [3]])
    made = model.generate(source, mask, bos_id=1, max_new_tokens=6)
    target = torch.ones(3, 1, dtype=torch.long)
    model.eval()
    with torch.no_grad():
        for _ in range(6):
            target = torch.cat([target, greedy(model(source, target, mask).logits[:, -1])], dim=1)
    assert torch.equal(made, target[:, 1:])
    assert made.max() < 25


def test_each_sequence_stops_at_its_end() -> None:
    model = MacformerLM(config())
    x = ids(4, 5)
    free = model.generate(x, max_new_tokens=10)
    eos = int(free[0, 3])
    ended = model.generate(x, max_new_tokens=10, eos_id=eos)
    for row, got in zip(free.tolist(), ended.tolist(), strict=True):
        stop = row.index(eos) + 1 if eos in row else 10
        assert got == (row[:stop] + [0] * 10)[: len(got)]
    alone = model.generate(x[:1], max_new_tokens=10, eos_id=eos)
    assert alone.shape[1] == free[0].tolist().index(eos) + 1, "nothing is made once all have ended"


def test_samples_follow_the_scores() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.1, 0.2, 0.3, 0.4]])).expand(4000, 5).clone()
    generator = torch.Generator().manual_seed(0)

    def shares(temperature: float, top_k: int | None) -> list[float]:
        chosen = choose(scores.clone(), temperature, top_k, generator)
        return (torch.bincount(chosen, minlength=5) / 4000).tolist()

    assert shares(1.0, None) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4], abs=0.03)
    assert shares(1.0, 2) == pytest.approx([0, 0, 0, 3 / 7, 4 / 7], abs=0.03)
    assert shares(0.5, None) == pytest.approx([0, 1 / 30, 4 / 30, 9 / 30, 16 / 30], abs=0.03)
    assert choose(scores.clone(), 0.0, None).unique().tolist() == [4]


def test_equal_generators_give_equal_samples() -> None:
    model, x = MacformerLM(config()), ids(2, 5)

    def sample(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(x, max_new_tokens=9, temperature=1.0, top_k=10, generator=generator)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_new_tokens": 0}, maclin.OptionError, "max_new_tokens is 0"),
        ({"temperature": -1.0}, maclin.OptionError, "greedy"),
        ({"top_k": 40}, maclin.OptionError, "1 to 39"),
        ({"eos_id": 0}, maclin.OptionError, "0 is padding"),
        ({"prompt": torch.ones(2, 0, dtype=torch.long)}, maclin.InputError, "at least one token"),
        ({"mask": torch.tensor([[True] * 4 + [False]])}, maclin.InputError, "padded on the left"),
        ({"mask": torch.ones(1, 4, dtype=torch.bool)}, maclin.InputError, r"wanted \(1, 5\)"),
        ({"max_new_tokens": 27}, maclin.InputError, "31 tokens, and the table of learned positions has 30"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = MacformerLM(config(position="learned"))
    with pytest.raises(error, match=words):
        model.generate(**{"prompt": ids(1, 5), "max_new_tokens": 4, **options})


def test_the_last_learned_position_can_be_used() -> None:
    assert MacformerLM(config(position="learned")).generate(ids(1, 5), max_new_tokens=26).shape == (1, 26)


def test_a_state_of_another_batch_is_refused() -> None:
    model = MacformerLM(config())
    state = model(ids(2, 5), return_state=True).state
    with pytest.raises(maclin.InputError, match="2 sequences; wanted what this model returned"):
        model(ids(3, 1), state=state)
