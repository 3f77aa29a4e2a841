"""Models that call scaled_dot_product_attention themselves; timm's among them, where timm and torchvision are there."""

import copy
import importlib
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maclin.adopt import capture, convert_, restore_
from maclin.adopt.hosts import host
from maclin.core.errors import CapabilityError
from maclin.core.mechanisms import Mechanism

PADDING = torch.arange(9).expand(2, 9) >= torch.tensor([[9], [5]])


def tokens(length: int = 9, seed: int = 0) -> Tensor:
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(seed))


class Attention(nn.Module):
    """Grouped heads, q and k normalised, and whatever mask it is told."""

    def __init__(self, causal: bool = False, groups: int = 2, dropout: float = 0.0, times: int = 1) -> None:
        super().__init__()
        self.causal, self.groups, self.dropout, self.times = causal, groups, dropout, times
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 32 // groups), nn.Linear(32, 32 // groups)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(32, 32)

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, 8)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.norm(self.heads(self.q(x))), self.norm(self.heads(self.k(x))), self.heads(self.v(x))
        drop = self.dropout if self.training else 0.0
        for _ in range(self.times):
            q = nn.functional.scaled_dot_product_attention(
                q, k, v, mask, drop, self.causal, enable_gqa=self.groups > 1, scale=0.5
            )
        return self.out(q.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Attention(**options), Attention(**options)])

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = x + block(x, mask)
        return x


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_softmax_equals_and_restoring_is_bit_equal(causal: bool, groups: int) -> None:
    model: Any = Model(causal=causal, groups=groups).eval()
    x = tokens()
    keep = None if causal else ~PADDING[:, None, None]
    batch = {"x": x, "mask": keep}
    found = host(model).layers(batch)
    assert [(one.name, one.num_heads, one.num_kv_heads, one.is_causal, one.refused) for one in found] == [
        (f"blocks.{i}", 4, 4 // groups, causal, None) for i in range(2)
    ]
    before = model(**batch)
    gradient = torch.autograd.grad(before.square().mean(), model.blocks[0].q.weight)[0]
    convert_(model, "softmax", batch=batch)
    calls = [m.register_forward_hook(lambda m, a, o: ran.append(str(m.name))) for m in model.modules()
             if isinstance(m, Mechanism)]  # fmt: skip
    ran: list[str] = []
    after = model(**batch)
    assert (len(ran), len(calls)) == (2, 2)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(after.square().mean(), model.blocks[0].q.weight)[0], gradient)
    convert_(model, "favor", batch=batch)
    keys = [key for key in model.state_dict() if "maclin_mechanism" not in key]
    converted = model(**batch)
    assert not torch.allclose(converted, before)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**batch), converted)
        restore_(other)
        assert torch.equal(other(**batch), before)
    restore_(model)
    assert torch.equal(model(**batch), before)
    assert list(model.state_dict()) == keys
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_captured_q_k_and_v_are_those_of_the_call() -> None:
    model: Any = Model().eval()
    x = tokens()
    convert_(model, "mean", batch=x)  # capture sees exact attention all the same
    captured = capture(model, [{"x": x, "mask": ~PADDING[:, None, None]}])
    first, second = (captured.calls[f"blocks.{i}"][0] for i in range(2))
    block = model.blocks[0]
    torch.testing.assert_close(first.q, block.norm(block.heads(block.q(x))))
    torch.testing.assert_close(first.v, block.heads(block.v(x)))
    assert first.scale == 0.5
    assert first.key_mask is not None
    assert torch.equal(first.key_mask, ~PADDING)
    restore_(model)
    own = x + block(x, ~PADDING[:, None, None])
    torch.testing.assert_close(second.v, model.blocks[1].heads(model.blocks[1].v(own)))


@pytest.mark.parametrize(
    ("options", "mask", "reason"),
    [
        ({}, torch.randn(2, 1, 9, 9), "more than padding of keys"),
        ({}, torch.full((2, 1, 1, 9), -0.5), "adds a bias"),
        ({"times": 2, "groups": 1}, None, "attends 2 times in 1 runs"),
    ],
)
def test_what_cannot_be_said_is_refused(options: dict[str, Any], mask: Tensor | None, reason: str) -> None:
    model, batch = Model(**options).eval(), {"x": tokens(), "mask": mask}
    before = model(**batch)
    with pytest.raises(CapabilityError, match=reason):
        convert_(model, "elu", batch=batch)
    assert torch.equal(model(**batch), before)
    if mask is not None:
        convert_(model, "elu", batch=tokens())
        with pytest.raises(CapabilityError, match=reason):
            model(**batch)


def test_modules_within_modules_are_refused() -> None:
    model = Model().eval()
    outer = Attention()
    outer.q = nn.Sequential(Attention(), nn.Linear(32, 32))  # pyright: ignore[reportAttributeAccessIssue]
    model.blocks[0] = outer
    assert [layer.refused for layer in host(model).layers(tokens())] == [
        None,
        "another attention module runs within it, blocks.0.q.0",
        None,
    ]


def test_dropout_in_training_is_refused_but_for_softmax() -> None:
    model = Model(dropout=0.3).train()
    convert_(model, "elu", batch=tokens())
    with pytest.raises(CapabilityError, match=r"attention dropout of 0\.3"):
        model(tokens())
    convert_(model, "softmax", batch=tokens())
    assert model(tokens()).isfinite().all()


def test_a_forward_that_another_library_replaced_is_refused() -> None:
    model = Model().eval()
    block: Any = model.blocks[1]
    block.forward = block.forward  # as such libraries do
    before = model(tokens())
    with pytest.raises(CapabilityError, match="another library"):
        convert_(model, "elu", batch=tokens())
    assert torch.equal(model(tokens()), before)
    assert not host(model).converted


@pytest.mark.slow
def test_a_compiled_model_is_the_same() -> None:
    model = Model().eval()
    convert_(model, "elu", batch=tokens())
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens()), model(tokens()), atol=1e-5, rtol=1e-5)


def timm() -> Any:
    """timm, where it and torchvision are there."""
    try:
        return importlib.import_module("timm")
    except Exception as error:  # torchvision may be missing, or be built for another torch
        pytest.skip(f"timm cannot be imported: {error}")


def timm_model(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 4, "depth": 2, "num_classes": 3}
    return timm().create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"reg_tokens": 2}, {"fused": False}])
def test_a_model_of_timm(options: dict[str, Any]) -> None:
    options = dict(options)
    fused = options.pop("fused", True)
    model, images = timm_model(**options), torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for block in model.blocks:
        block.attn.fused_attn = fused
    assert [(one.name, one.refused) for one in host(model).layers()] == [(f"blocks.{i}.attn", None) for i in range(2)]
    with torch.no_grad():
        before = model(images)
        convert_(model, "softmax")
        torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5)
        convert_(model, "macformer", batches=[images.repeat(8, 1, 1, 1)])
        converted = model(images)
        assert not torch.allclose(converted, before)
        assert torch.equal(pickle.loads(pickle.dumps(model))(images), converted)
        restore_(model)
        assert torch.equal(model(images), before)
    assert [block.attn.fused_attn for block in model.blocks] == [fused, fused]


@pytest.mark.filterwarnings("ignore")
def test_relative_positions_of_timm_are_refused() -> None:
    model = timm().create_model(
        "swin_tiny_patch4_window7_224", img_size=28, window_size=7, embed_dim=16, depths=(1, 1), num_heads=(2, 2)
    )
    with pytest.raises(CapabilityError, match="a bias of positions"):
        convert_(model, "elu")
