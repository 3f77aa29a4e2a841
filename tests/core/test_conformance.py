"""check_mechanism passes every mechanism of the registry, and catches every way to break the contract."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maclin
from maclin.core import mechanisms
from maclin.core.contract import Features, attend
from maclin.core.errors import InputError
from maclin.core.features import elu_features
from maclin.core.mechanisms import FeatureMechanism, Mechanism
from maclin.core.mechanisms.base import State
from maclin.core.mechanisms.elu import Elu
from maclin.core.mechanisms.linformer import Linformer
from maclin.testing import ConformanceError, check_mechanism

GAUSSIAN_SERIES = maclin.Kernel("bessel", lambda n: 0.0 if n % 2 else 1 / math.factorial(n // 2) ** 2)
CONFIGURATIONS: dict[str, list[dict[str, Any]]] = {
    "window": [{"window": 3}, {"window": 40}, {"window": 3, "sinks": 5}],
    "linformer": [
        *({"seq_len": 4096, "proj_len": 16, "sharing": x} for x in ("none", "headwise", "key-value", "layerwise")),
        *({"projection": x, "proj_len": 16} for x in ("mean-pool", "max-pool", "conv")),
    ],
    "efficient": [{"normalisation": "softmax"}, {"normalisation": "scaling"}],
    "rfa": [{"num_features": 16}, {"num_features": 16, "gate": True}, {"num_features": 16, "temperature": 0.3}],
    "favor": [{"num_features": 16}],
    "taylor": [{"kernel": "exp"}, {"kernel": GAUSSIAN_SERIES}],
    "macformer": [
        {"num_features": 16, "estimator": "published"},
        {"num_features": 16, "estimator": "kar_karnick"},
        {"num_features": 9, "estimator": "taylor"},
        {"num_features": 16, "kernel": "inv", "estimator": "published"},
        {"num_features": 16, "kernel": "sqrt", "ppsbn": "batch", "estimator": "published"},
        {"num_features": 16, "temperature": "learned", "estimator": "published"},
        {
            "num_features": 16,
            "kernel": "inv",
            "ppsbn": "batch",
            "temperature": "learned",
            "estimator": "published",
        },
        {"num_features": 16, "ppsbn": False, "estimator": "published"},
        {"num_features": 16, "kernel": GAUSSIAN_SERIES, "estimator": "published"},
        {},
        {"counts": (1, 8, 6, 0, 3)},
        {"counts": (1, 8, 36, 12, 4), "kernel": "log", "temperature": "learned"},
        {"num_features": "auto", "tolerance": 0.1},
        {"kernel": "auto", "ppsbn": "batch", "temperature": "learned"},
        {"kernel": GAUSSIAN_SERIES, "ppsbn": False},
        {"centred": True, "ppsbn": False},
        {"unbiased": True, "num_features": 30},
        {"unbiased": True, "num_features": 80, "kernel": "inv"},
        {"unbiased": True, "counts": (1, 8, 5, 0, 4), "num_features": 30, "centred": True},
        {"num_features": 16, "kernel": "exp", "estimator": "kar_karnick", "ppsbn": "batch", "temperature": "learned"},
    ],
}
CONFIGURATIONS["hedgehog"] = [{"num_features": 16}, {"num_features": 16, "activation": "softmax"}]
CONFIGURATIONS["hybrid"] = [
    {"window": 5, "linear_options": {"ppsbn": False, "num_features": 24}},
    {"window": 5, "linear_options": {"ppsbn": False, "num_features": 24}, "sinks": 3},
    {"window": 5, "linear_options": {"ppsbn": False, "centred": True, "counts": [1, 8, 4]}, "balance": "learned"},
    {"window": 20, "linear": "macformer", "linear_options": {"temperature": "learned"}},
    {"window": 5, "linear": "favor", "linear_options": {"num_features": 16}, "sinks": 3},
    {"window": 5, "linear": "hedgehog", "linear_options": {"num_features": 16}, "balance": "learned"},
    {"window": 5, "linear": "taylor"},
    {"window": 5, "linear": "rfa", "linear_options": {"num_features": 16}},
]
CONFIGURATIONS["by_head"] = [
    {"heads": ["elu", "elu", ("window", {"window": 3}), ("window", {"window": 3})]},
    {"heads": ["softmax", "softmax", "efficient", "efficient"]},
]
CASES = [(name, options) for name in mechanisms.names() for options in CONFIGURATIONS.get(name, [{}])]


def label(value: object) -> str:
    if not isinstance(value, dict):
        return str(value)
    return ",".join(getattr(x, "name", str(x)) for x in value.values()) or "default"


@pytest.mark.parametrize(("name", "options"), CASES, ids=label)
def test_every_mechanism_conforms(name, options):
    results = check_mechanism(lambda: maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **options))
    assert len(results) == 18
    for result in results:
        assert result.passed
        assert result.measured is not None or result.reason, result.name
    not_run = {result.name for result in results if result.measured is None}
    causal = {"causal_leak", "causal_alignment", "chunked_is_recurrent", "state_is_batch_first"}
    declared = {key.partition(":")[0] for key in mechanisms.row(name).exceptions}
    # those with one normaliser: the others divide by the count or per channel, have a gate or no features
    sums = issubclass(mechanisms.row(name).cls, FeatureMechanism) and name != "efficient" and not options.get("gate")
    assert not_run <= declared | (set() if mechanisms.row(name).causal else causal) | (
        set() if sums else {"own_features"}
    )


CALIBRATED: dict[str, dict[str, Any]] = {
    "stratified": {"num_features": 40},
    "raw": {"num_features": 60, "ppsbn": False},
    "counts": {"counts": (1, 8, 12, 5, 3, 2)},
    "auto": {"num_features": "auto", "tolerance": 0.05, "ppsbn": False},
    "kernel": {"kernel": "auto", "temperature": "learned"},
    "inv": {"kernel": "inv", "ppsbn": "batch", "temperature": "learned"},
    "unbiased": {"unbiased": True, "num_features": 60},
    "published": {"estimator": "published", "ppsbn": "batch", "temperature": "learned", "num_features": 16},
}


def calibrated(options: dict[str, Any], sizes: dict[str, int]) -> Mechanism:
    """Calibrated on keys and queries that are shifted and of unequal spread, with masks and causally."""
    generator = torch.Generator().manual_seed(9)
    width = sizes["head_dim"]
    heads, key_heads = sizes["num_heads"], sizes.get("num_kv_heads", sizes["num_heads"])
    spread = torch.linspace(1.5, 0.3, width)
    q, k, v = (torch.randn(4, h, 40, width, generator=generator) * spread + 0.2 for h in (heads, key_heads, key_heads))
    mask = torch.rand(4, 40, generator=generator) > 0.1
    return maclin.calibrate(maclin.mechanism("macformer", **sizes, **options), q, k, v, mask, is_causal=True)


@pytest.mark.parametrize(
    ("case", "heads"), [*((case, (4, 2)) for case in CALIBRATED), ("stratified", (3, 3)), ("unbiased", (2, 1))]
)
def test_a_calibrated_mechanism_conforms(case, heads):
    sizes = {"head_dim": 8, "num_heads": heads[0], "num_kv_heads": heads[1]}
    mech = calibrated(CALIBRATED[case], sizes)
    built: list[Mechanism] = []

    def again() -> Mechanism:
        """The calibrated one first, then what its configuration builds: the check loads the state of the first."""
        built.append(mech if not built else maclin.mechanism("macformer", **sizes, **mech.config))
        return copy.deepcopy(built[-1])

    options = CALIBRATED[case]
    own = options.get("temperature") == "learned" or options.get("ppsbn") == "batch"
    exceptions = {"grouped_heads": "temperature and statistics of a query head are its own"} if own else {}
    results = check_mechanism(again, exceptions=exceptions)
    assert len(built) == 2
    assert {result.name for result in results if result.measured is None} == set(exceptions)


@pytest.mark.parametrize("name", [name for name in mechanisms.names() if name not in CONFIGURATIONS])
def test_mechanisms_without_configurations_have_no_options_that_matter(name):
    """A new mechanism with options belongs in the table above."""
    assert set(mechanisms.row(name).options) <= {"dropout_p"}


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (3, 3)])
@pytest.mark.parametrize("name", ["macformer", "efficient", "linformer", "window"])
def test_other_numbers_of_heads_and_widths_conform(name, heads):
    options = {"linformer": {"projection": "mean-pool", "proj_len": 16}, "macformer": {"num_features": 12}}.get(
        name, {}
    )
    check_mechanism(lambda: maclin.mechanism(name, head_dim=5, num_heads=heads[0], num_kv_heads=heads[1], **options))


def test_exceptions_of_the_registry_name_a_check_and_give_a_reason():
    known = {result.name for result in check_mechanism(lambda: Elu(4, 1))}
    for name in mechanisms.names():
        for key, reason in mechanisms.row(name).exceptions.items():
            assert key.partition(":")[0] in known
            assert len(reason.split()) >= 5, (name, reason)


def test_the_exception_of_the_learned_linformer_is_no_exception_of_pooling():
    learned = check_mechanism(lambda: maclin.mechanism("linformer", head_dim=8, num_heads=2, seq_len=4096, proj_len=8))
    pooled = check_mechanism(
        lambda: maclin.mechanism("linformer", head_dim=8, num_heads=2, projection="mean-pool", proj_len=8)
    )
    (of_learned,), (of_pooled,) = ([x for x in xs if x.name == "left_padding"] for xs in (learned, pooled))
    assert of_learned.reason
    assert of_learned.measured is None
    assert of_pooled.measured is not None


def test_the_exception_is_needed():
    with pytest.raises(ConformanceError, match=r"fails 1 checks:\n  left_padding: "):
        check_mechanism(
            lambda: maclin.mechanism("linformer", head_dim=8, num_heads=2, seq_len=4096, proj_len=8), exceptions={}
        )


# Ways to break the contract, each small, and the check that has to see it.


class Broken(Elu):
    """elu + 1, which conforms, and then something that does not."""

    name = "broken"


class Leaks(Broken):
    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        _, new_state = super()._causal(q, k, v, key_mask, scale, state)
        return self._bidirectional(q, k, v, key_mask, scale), new_state


class LeaksThroughTheMaximum(Broken):
    """The stabiliser of the first FAVOR+: a maximum over all keys, plus a small constant."""

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        top = k.amax()
        features = Features(elu_features, lambda x: (x - top).exp() + 1e-4, self.head_dim)
        return attend_causal_with(self, features, q, k, v, key_mask, state)


def attend_causal_with(
    mech: FeatureMechanism,
    features: Features,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    state: State | None,
) -> tuple[Tensor, State]:
    from maclin.core.causal import attend_causal

    out, sums = attend_causal(q, k, v, features, mask, mech._sums(state, k, v, features))
    return out, tuple(sums)


class MasksOnlyTheValues(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        if key_mask is not None:
            v = v.masked_fill(~key_mask[:, None, :, None], 0.0)
        return super()._bidirectional(q, k, v, None, scale)


class StabilisesOverTheBatch(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        top = k.amax()
        features = Features(elu_features, lambda x: (x - top).exp() + 1e-4, self.head_dim)
        return attend(q, k, v, features, key_mask)


class DrawsInForward(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return super()._bidirectional(q * (1 + 1e-9 * torch.rand_like(q)), k, v, key_mask, scale)


class CountsItsCalls(Broken):
    calls: Tensor

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("calls", torch.zeros(()))

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        self.calls += 1
        return super()._bidirectional(q, k, v, key_mask, scale)


class MakesEveryPair(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        weights = elu_features(q * scale) @ elu_features(k).mT
        if key_mask is not None:
            weights = weights.masked_fill(~key_mask[:, None, None], 0.0)
        total = weights.sum(-1, keepdim=True)
        return weights @ v / torch.where(total == 0, 1.0, total)


class ForgetsAGradient(Broken):
    def features(self, scale: float) -> Features:
        return Features(lambda q: elu_features(q * scale), lambda k: elu_features(k.detach()), self.head_dim)


class ForgetsTheGradientOfItsParameter(Broken):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.weight = nn.Parameter(torch.full((self.head_dim,), 0.7))

    def features(self, scale: float) -> Features:
        weight = self.weight.detach()
        return Features(lambda q: elu_features(q * weight.to(q.dtype)), elu_features, self.head_dim)


class SumsInHalfPrecision(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        phi_q = elu_features(q * scale)
        phi_k, v = (x.repeat_interleave(groups, dim=1) for x in (elu_features(k), v))
        if key_mask is not None:
            phi_k = phi_k.masked_fill(~key_mask[:, None, :, None], 0.0)
        kv, z = torch.zeros_like(phi_k[:, :, :1].mT @ v[:, :, :1]), torch.zeros_like(phi_k[:, :, 0])
        for j in range(k.shape[2]):
            kv = kv + phi_k[:, :, j, :, None] * v[:, :, j, None]
            z = z + phi_k[:, :, j]
        total = (phi_q * z[:, :, None]).sum(-1, keepdim=True)
        return phi_q @ kv / torch.where(total == 0, torch.ones_like(total), total)


class ForgetsTheMaskInItsState(Broken):
    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        out, _ = super()._causal(q, k, v, key_mask, scale, state)
        return out, super()._causal(q, k, v, None, scale, state)[1]


class MergesTheBatchInItsState(Broken):
    """The sums of the whole batch lie in the sample of the batch that comes first."""

    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        if state is not None:
            state = tuple(x.flip(0) for x in state)
        out, new_state = super()._causal(q, k, v, key_mask, scale, state)
        return out, tuple(x.flip(0) for x in new_state)


class AlignsTheFirstQueryWithTheFirstKey(Broken):
    def _causal(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, state: State | None
    ) -> tuple[Tensor, State]:
        n = q.shape[2]
        mask = None if key_mask is None else key_mask[:, :n]
        return super()._causal(q, k[:, :, :n], v[:, :, :n], mask, scale, state)


class KnowsWhereKeysStand(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return super()._bidirectional(q, k * torch.arange(1.0, k.shape[2] + 1)[:, None].to(k), v, key_mask, scale)


class IsUndefinedWithoutKeys(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        out = super()._bidirectional(q, k, v, key_mask, scale)
        return out if key_mask is None else out / key_mask.any(-1)[:, None, None, None]


class KeepsItsDrawToItself(Broken):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.directions = torch.randn(self.head_dim)

    def features(self, scale: float) -> Features:
        return Features(lambda q: elu_features(q * self.directions.to(q)), elu_features, self.head_dim)


class FloorsWithoutSayingSo(Broken):
    """Weights that do not belong to the features: those of every query are raised."""

    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        features = Features(lambda x: elu_features(x * scale) + 0.1, elu_features, self.head_dim)
        return attend(q, k, v, features, key_mask)


class TellsQueryHeadsApart(Broken):
    def features(self, scale: float) -> Features:
        factor = torch.arange(1.0, self.num_heads + 1)[:, None, None]
        return Features(lambda q: elu_features(q * factor.to(q)), elu_features, self.head_dim)


class GroupsHeadsTheOtherWayRound(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        groups = self.num_heads // self.num_kv_heads
        features = Features(lambda x: elu_features(x * scale), elu_features, self.head_dim)
        return attend(q, k.repeat(1, groups, 1, 1), v.repeat(1, groups, 1, 1), features, key_mask)


class IgnoresThePacking(Broken):
    def forward(self, *tensors: Tensor, cu_seqlens: Tensor | None = None, **arguments: Any) -> Any:
        return super().forward(*tensors, **arguments)


class IgnoresCausality(Broken):
    causal = False

    def forward(self, *tensors: Tensor, is_causal: bool = False, **arguments: Any) -> Any:
        return super().forward(*tensors, **arguments)


class ReturnsFloat32(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return super()._bidirectional(q, k, v, key_mask, scale).float()


class ReturnsTheWidthOfKeys(Broken):
    def _bidirectional(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
        return super()._bidirectional(q, k, v[..., : self.head_dim], key_mask, scale)


class TakesNoArguments(nn.Module):
    """Not under the contract at all: no keyword is understood."""

    head_dim, num_heads, num_kv_heads, causal = 8, 4, 2, False

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q


BROKEN: list[tuple[type[nn.Module], str]] = [
    (Leaks, "causal_leak"),
    (LeaksThroughTheMaximum, "causal_leak"),
    (MasksOnlyTheValues, "right_padding"),
    (StabilisesOverTheBatch, "batch_independence"),
    (DrawsInForward, "determinism"),
    (CountsItsCalls, "determinism"),
    (MakesEveryPair, "linear_memory"),
    (ForgetsAGradient, "gradients"),
    (ForgetsTheGradientOfItsParameter, "gradients"),
    (SumsInHalfPrecision, "half_precision"),
    (ForgetsTheMaskInItsState, "chunked_is_recurrent"),
    (MergesTheBatchInItsState, "state_is_batch_first"),
    (AlignsTheFirstQueryWithTheFirstKey, "causal_alignment"),
    (KnowsWhereKeysStand, "left_padding"),
    (IsUndefinedWithoutKeys, "masked_rows"),
    (KeepsItsDrawToItself, "state_dict"),
    (TellsQueryHeadsApart, "grouped_heads"),
    (FloorsWithoutSayingSo, "own_features"),
    (GroupsHeadsTheOtherWayRound, "grouped_heads"),
    (IgnoresThePacking, "packed"),
    (IgnoresCausality, "refusals"),
    (ReturnsFloat32, "shapes"),
    (ReturnsTheWidthOfKeys, "shapes"),
    (TakesNoArguments, "shapes"),
]


def failures(factory: Callable[[], nn.Module]) -> set[str]:
    try:
        check_mechanism(factory)
    except ConformanceError as error:
        lines = str(error).splitlines()
        return {line.strip().partition(":")[0] for line in lines[1:]}
    return set()


def build(cls: type[nn.Module]) -> nn.Module:
    return cls(8, 4, 2) if issubclass(cls, Mechanism) else cls()


def test_what_the_broken_ones_start_from_conforms():
    assert failures(partial(build, Broken)) == set()


@pytest.mark.parametrize(("cls", "check"), BROKEN, ids=lambda x: getattr(x, "__name__", x))
def test_a_broken_mechanism_is_caught_by_the_right_check(cls, check):
    assert check in failures(partial(build, cls))


def test_every_check_catches_something():
    assert {result.name for result in check_mechanism(partial(build, Broken))} == {check for _, check in BROKEN}


def test_the_message_lists_every_failed_check_with_figures():
    with pytest.raises(
        ConformanceError, match=r"Leaks fails \d+ checks:\n(.*\n)*  causal_leak: [\d.e+-]+, allowed 1e-09"
    ):
        check_mechanism(partial(build, Leaks))


def test_a_declared_exception_is_reported_with_its_reason():
    results = check_mechanism(partial(build, CountsItsCalls), exceptions={"determinism": "it counts on purpose"})
    by_name = {result.name: result for result in results}
    assert by_name["determinism"].reason == "it counts on purpose"
    assert by_name["determinism"].measured is None
    assert by_name["shapes"].measured == 0


def test_an_exception_from_no_check_is_refused():
    with pytest.raises(InputError, match="no check 'determinsm'; known are shapes, right_padding"):
        check_mechanism(partial(build, Broken), exceptions={"determinsm": "a slip of the pen"})


def test_a_subclass_does_not_inherit_the_exceptions_of_the_registry():
    class Own(Linformer):
        pass

    with pytest.raises(ConformanceError, match="left_padding"):
        check_mechanism(lambda: Own(8, 2, seq_len=4096, proj_len=8))


def test_what_lacks_the_sizes_is_named():
    with pytest.raises(InputError, match="Linear has no integer attribute 'head_dim'"):
        check_mechanism(lambda: nn.Linear(3, 3))
