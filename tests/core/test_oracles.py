"""Every mechanism against a slow float64 formula over all pairs of query and key, with masks, groups and blocks."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import blocks as out_blocks
from maclin.core import causal as causal_contract
from maclin.core import contract, reference
from maclin.core.kernels import Kernel
from maclin.core.kernels import kernel as kernel_of
from maclin.core.mechanisms import FeatureMechanism
from maclin.core.mechanisms.macformer import Macformer

KINDS = ["none", "right", "left", "random", "all"]
SHAPES = [
    (7, 11, False),
    (11, 7, False),
    (60, 150, False),
    (1, 9, True),
    (7, 11, True),
    (150, 150, True),
    (40, 290, True),
]
HALF_COSH = Kernel("half-cosh", lambda n: 0.5 if n == 0 else 0.0 if n % 2 else 1 / math.factorial(n))


def build(name: str, calibrated: Any = None, **options) -> maclin.Mechanism:
    known = (
        options
        if name not in ("rfa", "macformer", "favor")
        else {"generator": torch.Generator().manual_seed(5), **options}
    )
    mech = maclin.mechanism(name, head_dim=8, num_heads=4, num_kv_heads=2, **known).double().eval()
    if calibrated is None:
        return mech
    # shifted, of unequal spread, and shorter than what comes later: so the floor has something to do
    generator = torch.Generator().manual_seed(6)
    spread = torch.linspace(1.6, 0.4, 8, dtype=torch.float64)
    q, k, v = (
        (torch.randn(3, heads, 40, 8, generator=generator, dtype=torch.float64) * spread + 0.3) for heads in (4, 2, 2)
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(7)
        return maclin.calibrate(mech, calibrated * q, calibrated * k, v)


def floor_of(mech: maclin.Mechanism) -> float:
    """A truncated series of centred keys keeps 0.7 of what its constant gives; nothing else has a floor."""
    calibrated = getattr(mech, "calibration", None) is not None
    return 0.7 if calibrated and not mech.config["unbiased"] and mech.config["centred"] else 0.0


def group(weight: Tensor, heads: int) -> Tensor:
    """A draw per key head (Hk, D, R), for each of ``heads`` heads."""
    return weight.double().repeat_interleave(heads // len(weight), dim=0)


def mean_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    return torch.ones(*x.shape[:-1], 1, dtype=x.dtype)


def elu_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    return torch.nn.functional.elu(x) + 1


def rfa_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True) * math.sqrt(scale)
    angles = torch.einsum("bhnd,hdm->bhnm", unit, group(mech.get_buffer("frequencies"), x.shape[1]))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # in another order: it cannot matter


def favor_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    x = x * math.sqrt(scale)
    projected = torch.einsum("bhnd,hdm->bhnm", x, group(mech.get_buffer("directions"), x.shape[1]))
    return (projected - x.square().sum(-1, keepdim=True) / 2).exp()


def macformer_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    """The products of the directions, one feature after the other, of vectors that ppSBN has standardised."""
    assert isinstance(mech, Macformer)
    if mech.ppsbn == "token":
        x = x - x.mean(-1, keepdim=True)
        x = x / x.norm(dim=-1, keepdim=True)
    directions = group(mech.map.get_buffer("directions"), x.shape[1])
    degrees = mech.map.get_buffer("degrees").tolist()
    m = len(degrees)
    features = []
    for i, degree in enumerate(degrees):
        if mech.estimator == "published":
            count = 1.0 if degree == 0 else 2.0**-degree / (1 - 2.0**-20) * (m - 1)
        else:
            count = 2.0 ** -(degree + 1) * m
        value = torch.full(x.shape[:-1], math.sqrt(mech.kernel.coefficient(degree) / count), dtype=x.dtype)
        for rank in range(degree):
            column = sum(sum(d > r for d in degrees) for r in range(rank)) + i
            value = value * torch.einsum("bhnd,hd->bhn", x, directions[:, :, column]) * math.sqrt(scale)
        features.append(value)
    return torch.stack(features, dim=-1)


def stratified_map(mech: maclin.Mechanism, x: Tensor, scale: float) -> Tensor:
    """Coefficient times product of the directions of B^T (x - c), one feature after the other; keys have weights."""
    assert isinstance(mech, Macformer)
    heads, keys = x.shape[1], x.shape[1] == 2
    if mech.ppsbn == "token":
        x = x - x.mean(-1, keepdim=True)
        x = x / x.norm(dim=-1, keepdim=True)
    side = "k" if keys else "q"
    part = {name: group(t, heads) for name, t in mech.map.named_buffers() if t.dim() > 1}
    x = x - part[f"{side}_centre"][:, None]
    u = torch.einsum("bhnd,hde->bhne", x, part[f"{side}_basis"]) * math.sqrt(scale)
    degrees = mech.map.get_buffer("degrees").tolist()
    features = []
    for i, degree in enumerate(degrees):
        # a constant has sqrt(a_0), whatever its coefficient says
        value = part["coefficients"][:, i, None] * torch.ones(x.shape[:-1], dtype=x.dtype)
        if degree == 0:
            value = torch.full(x.shape[:-1], math.sqrt(mech.kernel.coefficient(0)), dtype=x.dtype)
        for rank in range(degree):
            column = sum(sum(d > r for d in degrees) for r in range(rank)) + i
            # the bases cancel in degree 1, where all of it is exact
            factor = x * math.sqrt(scale) if degree == 1 and not mech.config["unbiased"] else u
            value = value * torch.einsum("bhne,he->bhn", factor, part["directions"][:, :, column])
        features.append(value)
    phi = torch.stack(features, dim=-1)
    if keys:
        phi = phi * (scale * torch.einsum("bhnd,hd->bhn", x, part["q_centre"])).exp()[..., None]
    return phi


Map = Callable[[maclin.Mechanism, Tensor, float], Tensor]
MAPS: dict[str, tuple[str, dict[str, object], Map, float | None]] = {
    # name, options, the map written out, the scale that scale=None means (1/sqrt(D) if None)
    "mean": ("mean", {}, mean_map, None),
    "elu": ("elu", {}, elu_map, 1.0),
    "rfa": ("rfa", {"num_features": 32}, rfa_map, 1.0),
    "rfa-warm": ("rfa", {"num_features": 32, "temperature": 1.7}, rfa_map, 1 / 1.7),
    "favor": ("favor", {"num_features": 21}, favor_map, None),
    "published": ("macformer", {"num_features": 24, "estimator": "published"}, macformer_map, None),
    "kar_karnick": ("macformer", {"num_features": 33, "estimator": "kar_karnick"}, macformer_map, None),
    "inv": ("macformer", {"num_features": 24, "kernel": "inv", "estimator": "published"}, macformer_map, None),
    "own": ("macformer", {"num_features": 48, "kernel": HALF_COSH, "estimator": "published"}, macformer_map, None),
    "raw": ("macformer", {"num_features": 48, "ppsbn": False, "estimator": "published"}, macformer_map, None),
    "stratified": ("macformer", {"num_features": 30}, stratified_map, None),
    "stratified-inv": ("macformer", {"kernel": "inv", "counts": (1, 8, 9, 0, 2)}, stratified_map, None),
    "stratified-own": ("macformer", {"kernel": HALF_COSH, "counts": (1, 8, 9, 5, 3)}, stratified_map, None),
    "unbiased": ("macformer", {"num_features": 24, "unbiased": True}, stratified_map, None),
    "unbiased-log": ("macformer", {"num_features": 60, "unbiased": True, "kernel": "log"}, stratified_map, None),
    "calibrated": ("macformer", {"num_features": 40, "calibrated": 1.0}, stratified_map, None),
    "calibrated-raw": ("macformer", {"num_features": 45, "ppsbn": False, "calibrated": 1.0}, stratified_map, None),
    "calibrated-sqrt": ("macformer", {"kernel": "sqrt", "num_features": 30, "calibrated": 1.0}, stratified_map, None),
    "calibrated-unbiased": (
        "macformer",
        {"num_features": 60, "ppsbn": False, "unbiased": True, "calibrated": 0.6},
        stratified_map,
        None,
    ),
}


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch) -> None:
    """Once as it is, and once in blocks and chunks so small that every case crosses their boundaries."""
    if request.param == "blocks":
        monkeypatch.setattr(contract, "_MOST_BYTES", 1)
        monkeypatch.setattr(out_blocks, "_MIN_BLOCK", 6)
        monkeypatch.setattr(causal_contract, "_CHUNK", 13)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MAPS)
def test_feature_maps_in_the_contraction(qkv, key_mask, rel_error, case, kind):
    name, options, phi, own_scale = MAPS[case]
    mech = build(name, **options)
    for n, s, causal in SHAPES:
        q, k, v = qkv(n, s)
        mask = key_mask(kind, s)
        scale = 8**-0.5 if own_scale is None else own_scale
        wanted = reference.feature_attention(
            phi(mech, q, scale), phi(mech, k, scale), v, key_mask=mask, is_causal=causal, floor=floor_of(mech)
        )
        assert rel_error(mech(q, k, v, key_mask=mask, is_causal=causal), wanted) < 1e-8, (n, s, causal)


@pytest.mark.parametrize("case", ["rfa", "favor", "published", "inv", "stratified", "unbiased", "calibrated-raw"])
def test_a_given_scale_replaces_the_own(qkv, rel_error, case):
    name, options, phi, _ = MAPS[case]
    mech = build(name, **options)
    q, k, v = qkv(20, 30)
    wanted = reference.feature_attention(phi(mech, q, 0.5), phi(mech, k, 0.5), v, floor=floor_of(mech))
    assert rel_error(mech(q, k, v, scale=0.5), wanted) < 1e-9


def test_the_scale_of_elu_multiplies_the_queries(qkv, rel_error):
    q, k, v = qkv(20, 30)
    phi_q, phi_k = (torch.nn.functional.elu(x) + 1 for x in (0.6 * q, k))
    wanted = reference.feature_attention(phi_q, phi_k, v)
    assert rel_error(build("elu")(q, k, v, scale=0.6), wanted) < 1e-9


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "kernel", ["exp", "inv", "log", "sqrt", "trigh", HALF_COSH], ids=lambda kernel: getattr(kernel, "name", kernel)
)
def test_taylor_is_the_first_order_of_its_kernel(qkv, key_mask, rel_error, kernel, kind):
    mech = build("taylor", kernel=kernel)
    row = kernel_of(kernel)
    first_order = Kernel("first", lambda n: row.coefficient(n) if n < 2 else 0.0, closed_form=lambda t: a0 + a1 * t)
    a0, a1 = row.coefficient(0), row.coefficient(1)
    for n, s, causal in SHAPES:
        q, k, v = qkv(n, s)
        for scale in (None, 0.05):
            arguments = {"key_mask": key_mask(kind, s), "is_causal": causal, "scale": scale}
            wanted = reference.kernel_attention(q, k, v, first_order, **arguments)
            assert rel_error(mech(q, k, v, **arguments), wanted) < 1e-7, (n, s, causal, scale)


@pytest.mark.parametrize("kind", KINDS)
def test_softmax(qkv, key_mask, rel_error, kind):
    mech = build("softmax")
    for n, s, causal in SHAPES:
        q, k, v = qkv(n, s)
        for scale in (None, 1.3):
            arguments = {"key_mask": key_mask(kind, s), "is_causal": causal, "scale": scale}
            wanted = reference.softmax_attention(q, k, v, **arguments)
            assert rel_error(mech(q, k, v, **arguments), wanted) < 1e-12, (n, s, causal, scale)


def test_softmax_in_blocks_of_queries(monkeypatch, qkv, key_mask, rel_error):
    monkeypatch.setattr("maclin.core.mechanisms.softmax._QUERY_BLOCK", 7)
    q, k, v = qkv(40, 55)
    for kind in KINDS:
        arguments = {"key_mask": key_mask(kind, 55), "is_causal": True}
        wanted = reference.softmax_attention(q, k, v, **arguments)
        assert rel_error(build("softmax")(q, k, v, **arguments), wanted) < 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 5, 40, 1000])
def test_window(qkv, key_mask, rel_error, window, kind):
    mech = build("window", window=window)
    for n, s, causal in [*SHAPES, (200, 90, False), (90, 200, False), (300, 300, False)]:
        q, k, v = qkv(n, s)
        arguments = {"key_mask": key_mask(kind, s), "is_causal": causal, "scale": 0.8}
        wanted = reference.softmax_attention(q, k, v, window=window, **arguments)
        assert rel_error(mech(q, k, v, **arguments), wanted) < 1e-12, (n, s, causal)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
def test_efficient(qkv, key_mask, rel_error, normalisation, kind):
    mech = build("efficient", normalisation=normalisation)
    for n, s, causal in SHAPES:
        q, k, v = qkv(n, s)
        for scale in (None, 0.4):
            arguments = {"key_mask": key_mask(kind, s), "is_causal": causal}
            wanted = reference.efficient_attention(
                q, k, v, normalisation=normalisation, scale=scale or 1.0, **arguments
            )
            assert rel_error(mech(q, k, v, scale=scale, **arguments), wanted) < 1e-9, (n, s, causal)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kind", KINDS)
def test_gated_rfa_is_the_recurrence(qkv, key_mask, rel_error, kind):
    mech = build("rfa", num_features=16, gate=True)
    with torch.no_grad():
        mech.get_parameter("gate_weight").normal_(generator=torch.Generator().manual_seed(1))
        mech.get_parameter("gate_bias").copy_(torch.tensor([0.5, 2.0]))
    q, k, v = qkv(160, 160)
    mask = key_mask(kind, 160)
    logits = torch.einsum("bhnd,hd->bhn", k, mech.get_parameter("gate_weight")) + torch.tensor([[0.5], [2.0]])
    wanted = reference.gated_attention(rfa_map(mech, q, 1.0), rfa_map(mech, k, 1.0), v, torch.sigmoid(logits), mask)
    assert rel_error(mech(q, k, v, key_mask=mask, is_causal=True), wanted.detach()) < 1e-8
    # fewer queries than keys: the last rows of the same recurrence
    assert rel_error(mech(q[:, :, -33:], k, v, key_mask=mask, is_causal=True), wanted.detach()[:, :, -33:]) < 1e-8


def linformer_formula(
    q: Tensor, k: Tensor, v: Tensor, slots: Callable[[int, int], tuple[Tensor, Tensor]], scale: float
) -> Tensor:
    """softmax(scale q K'^T) V' for each sample and head, with K' and V' of that sample and key head."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = slots(b, h * k.shape[1] // q.shape[1])
            if len(keys):
                out[b, h] = torch.softmax(scale * q[b, h] @ keys.T, dim=-1) @ values
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharing", ["none", "headwise", "key-value", "layerwise"])
def test_learned_linformer(qkv, key_mask, rel_error, sharing, kind):
    mech = build("linformer", seq_len=40, proj_len=6, sharing=sharing, generator=torch.Generator().manual_seed(2))
    parameters = dict(mech.named_parameters())
    for n, s in ((11, 40), (40, 40), (30, 17)):
        q, k, v = qkv(n, s)
        mask = key_mask(kind, s)

        def slots(b: int, h: int, k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> tuple[Tensor, Tensor]:
            e, f = parameters["E"], parameters.get("F", parameters["E"])
            attended = [j for j in range(k.shape[2]) if mask is None or mask[b, j]]
            e, f = (x[h if sharing == "none" else 0][:, attended] for x in (e, f))
            if not attended:
                return k[b, h, :0], v[b, h, :0]
            return e @ k[b, h, attended], f @ v[b, h, attended]

        for scale in (None, 0.2):
            wanted = linformer_formula(q, k, v, slots, 8**-0.5 if scale is None else scale)
            assert rel_error(mech(q, k, v, key_mask=mask, scale=scale), wanted) < 1e-11, (n, s)


def pooled(x: Tensor, projection: str, proj_len: int) -> Tensor:
    """Segments of the rows of x, pooled one by one: row r of c belongs to segment floor(r k / c)."""
    count = len(x)
    rows = []
    for segment in range(proj_len):
        ranks = [r for r in range(count) if r * proj_len // count == segment]
        if not ranks:
            continue
        members = x[ranks]
        if projection == "mean-pool":
            rows.append(members.mean(0))
        elif projection == "max-pool":
            rows.append(members.max(0).values)
        else:
            width = math.ceil(count / proj_len)
            hann = torch.tensor([math.sin(math.pi * (i + 0.5) / width) ** 2 for i in range(len(ranks))], dtype=x.dtype)
            hann = hann.clamp_min(1e-3)
            rows.append((hann[:, None] * members).sum(0) / hann.sum())
    return torch.stack(rows) if rows else x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["mean-pool", "max-pool", "conv"])
def test_pooling_linformer(qkv, key_mask, rel_error, projection, kind):
    mech = build("linformer", proj_len=6, projection=projection)
    for n, s in ((11, 40), (40, 41), (30, 17), (5, 4), (3, 6)):
        q, k, v = qkv(n, s)
        mask = key_mask(kind, s)

        def slots(b: int, h: int, k: Tensor = k, v: Tensor = v, mask: Tensor | None = mask) -> tuple[Tensor, Tensor]:
            attended = [j for j in range(k.shape[2]) if mask is None or mask[b, j]]
            return pooled(k[b, h, attended], projection, 6), pooled(v[b, h, attended], projection, 6)

        wanted = linformer_formula(q, k, v, slots, 8**-0.5)
        assert rel_error(mech(q, k, v, key_mask=mask), wanted) < 1e-11, (n, s)


@pytest.mark.parametrize("normalisation", ["softmax", "scaling"])
def test_the_causal_form_of_efficient_ends_in_the_bidirectional_one(qkv, normalisation):
    """The last query sees all keys, so both forms agree on it: the oracle's two branches, and ours."""
    q, k, v = qkv(140, 140)
    mech = build("efficient", normalisation=normalisation)
    torch.testing.assert_close(mech(q, k, v, is_causal=True)[:, :, -1], mech(q, k, v)[:, :, -1], rtol=1e-9, atol=1e-12)


def test_the_oracles_agree_with_each_other(qkv, key_mask):
    """Softmax is the exponential kernel; a kernel is the product of its features."""
    q, k, v = qkv(20, 30)
    arguments = {"key_mask": key_mask("random", 30), "is_causal": True}
    softmax = reference.softmax_attention(q, k, v, **arguments)
    exponential = reference.kernel_attention(q, k, v, maclin.KERNELS["exp"], **arguments)
    torch.testing.assert_close(softmax, exponential, rtol=1e-11, atol=1e-13)
    square = Kernel("square", lambda n: float(n == 2), closed_form=torch.square)
    phi_q, phi_k = (torch.einsum("bhni,bhnj->bhnij", x, x).flatten(-2) for x in (q, k))
    torch.testing.assert_close(
        reference.kernel_attention(q, k, v, square, **arguments),
        reference.feature_attention(phi_q, phi_k, v, **arguments),
        rtol=1e-10,
        atol=1e-12,
    )


def test_a_masked_key_outside_the_domain_of_a_kernel_does_not_matter(qkv):
    q, k, v = qkv(5, 6)
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4] = False
    wanted = reference.kernel_attention(q, k, v, maclin.KERNELS["log"], key_mask=mask, scale=0.9)
    k[:, :, 4] *= 50.0  # log(1 - t) is NaN there
    got = reference.kernel_attention(q, k, v, maclin.KERNELS["log"], key_mask=mask, scale=0.9)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", MAPS)
def test_feature_map_shows_what_the_contraction_uses(qkv, case):
    name, options, phi, own_scale = MAPS[case]
    mech = build(name, **options)
    assert isinstance(mech, FeatureMechanism)
    q, k, _ = qkv(5, 6)
    scale = 8**-0.5 if own_scale is None else own_scale
    similarity = mech.query_map(q) @ mech.feature_map(k).repeat_interleave(2, dim=1).mT
    wanted = phi(mech, q, scale) @ phi(mech, k, scale).repeat_interleave(2, dim=1).mT
    # equal up to a constant, which cancels in the quotient
    torch.testing.assert_close(similarity / similarity.norm(), wanted / wanted.norm(), rtol=1e-8, atol=1e-10)
    assert mech.feature_map(k).shape[-1] <= getattr(mech, "num_features", 8)
