"""Monomials and their worth, against brute force on small data."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import maclin
from maclin.core import design, reference
from maclin.core.kernels import KERNELS, Kernel
from maclin.core.norms import token_standardise

HALF_COSH = Kernel("half-cosh", lambda n: 0.5 if n == 0 else 0.0 if n % 2 else 1 / math.factorial(n))
FIVE_AND_ONE = [*KERNELS.values(), HALF_COSH]


def documents_of(q: Tensor, k: Tensor, v: Tensor, scale: float = 1.0, causal: bool = False) -> list[design.Document]:
    root = math.sqrt(scale)
    return design.documents(q * root, k * root, v, None, causal, 0)


def uneven(seed: int = 0, n: int = 60, d: int = 5, batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Shifted, of unequal spread, keys otherwise than queries."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(2, d, d, generator=generator, dtype=torch.float64)
    q, k, v = (torch.randn(batch, 1, n, d, generator=generator, dtype=torch.float64) for _ in range(3))
    return 0.4 * (q @ mixing[0]) + 0.5, 0.3 * (k @ mixing[1]) - 0.3, v


@pytest.mark.parametrize("centred", [False, True])
def test_a_balanced_basis_keeps_dot_products_and_shares_its_moments(centred):
    docs = documents_of(*uneven())
    basis = design.basis_of(docs, centred)
    torch.testing.assert_close(basis.q @ basis.k.mT, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-11)
    x = torch.cat([doc.x for doc in docs])
    if centred:
        torch.testing.assert_close(basis.q_centre, x.mean(0))
    else:
        assert not basis.q_centre.any()
        assert not basis.k_centre.any()
    u = (x - basis.q_centre) @ basis.q
    of_w = torch.zeros(5, 5, dtype=torch.float64)
    mean = torch.zeros(5, dtype=torch.float64)
    for doc in docs:
        h = torch.softmax((doc.y * basis.q_centre).sum(-1), 0)
        w = (doc.y - basis.k_centre) @ basis.k
        of_w += sum(h[j] * torch.outer(w[j], w[j]) for j in range(len(w))) / len(docs)
        mean += h @ (doc.y - basis.k_centre) / len(docs)
    torch.testing.assert_close(u.mT @ u / len(u), basis.spread.diag(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(of_w, basis.spread.diag(), rtol=1e-4, atol=1e-4)
    if centred:
        assert float(mean.abs().max()) < 1e-12
    assert torch.equal(basis.spread, basis.spread.sort(descending=True).values)


@pytest.mark.parametrize("case", ["rank one keys", "constant keys", "no keys to speak of", "mean removed", "one query"])
def test_degenerate_data_stay_finite(case):
    q, k, v = uneven(1)
    if case == "rank one keys":
        k = k[..., :1] * torch.linspace(-1, 2, 5, dtype=torch.float64)
    elif case == "constant keys":
        k = k[:, :, :1].expand_as(k)
    elif case == "no keys to speak of":
        k = 0 * k
    elif case == "mean removed":
        q, k = token_standardise(q), token_standardise(k)
    else:
        q = q[:, :, :1].expand_as(q)
    basis = design.basis_of(documents_of(q, k, v), True)
    assert all(bool(x.isfinite().all()) for x in (basis.q, basis.k, basis.q_centre, basis.k_centre, basis.spread))
    torch.testing.assert_close(basis.q @ basis.k.mT, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-6)
    mech = maclin.mechanism("macformer", head_dim=5, num_heads=1, ppsbn=False).double()
    mech = maclin.calibrate(mech, q, k, v)
    exact = reference.kernel_attention(q, k, v, KERNELS["exp"])
    assert float((mech(q, k, v) - exact).norm() / exact.norm()) < 0.06


@pytest.mark.parametrize("kernel", FIVE_AND_ONE, ids=lambda kernel: kernel.name)
def test_all_monomials_of_a_degree_are_its_power(kernel):
    generator = torch.Generator().manual_seed(2)
    u, w = torch.randn(2, 7, 3, generator=generator, dtype=torch.float64)
    axes = design.candidates(torch.tensor([3.0, 2.0, 0.5]), [1000] * 4)
    assert [len(chosen) for chosen in axes] == [math.comb(2 + n, n) for n in range(6)]
    t = u @ w.mT
    for n, (p, psi) in enumerate(zip(*(design.monomials(x, axes, kernel) for x in (u, w)), strict=True)):
        torch.testing.assert_close(p @ psi.mT, kernel.coefficient(n) * t**n, rtol=1e-12, atol=1e-12)


def test_the_multiplicity_counts_the_orders_of_a_product():
    axes = torch.tensor(list(itertools.combinations_with_replacement(range(4), 4)))
    wanted = [len(set(itertools.permutations(row))) for row in axes.tolist()]
    assert design.multiplicity(axes).tolist() == wanted
    assert design.multiplicity(torch.empty(1, 0, dtype=torch.int64)).tolist() == [1]


@pytest.mark.parametrize("most", [1, 6, 20, 10_000])
def test_candidates_are_those_of_the_largest_products(most):
    spread = torch.tensor([2.3, 1.7, 1.1, 0.6, 0.31], dtype=torch.float64)
    for n, axes in enumerate(design.candidates(spread, [most] * 3)):
        every = sorted(
            itertools.combinations_with_replacement(range(5), n),
            key=lambda row: -math.prod(spread[i].item() for i in row),
        )
        wanted = every if n < 2 else every[:most]
        assert [tuple(row) for row in axes.tolist()] == wanted


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kernel", [KERNELS["exp"], KERNELS["sqrt"]], ids=lambda kernel: kernel.name)
def test_the_worth_of_a_monomial_is_what_leaving_it_out_costs(kernel, causal):
    q, k, v = uneven(3, n=30, d=3)
    # small, so that the first order is nearly all
    docs = documents_of(0.3 * q, 0.3 * k, v + 1.0, causal=causal)
    basis = design.basis_of(docs, kernel.is_exponential)
    found = design.appraise(docs, basis, kernel, design.candidates(basis.spread, [100] * 2))
    for axes, worth in list(zip(found.axes, found.worth, strict=True))[2:]:
        assert torch.equal(worth, worth.sort(descending=True).values)
        for row, got in zip(axes, worth, strict=True):
            square = total = 0.0
            for doc in docs:
                x, y = doc.x - basis.q_centre, doc.y - basis.k_centre
                similarity = kernel(x @ y.mT)
                p, psi = (
                    math.sqrt(kernel.coefficient(len(row)) * len(set(itertools.permutations(row.tolist()))))
                    * side[:, row].prod(-1, keepdim=True)
                    for side in (x @ basis.q, y @ basis.k)
                )
                h = (y @ basis.q_centre).exp()
                allowed = torch.ones_like(similarity) if doc.allowed is None else doc.allowed.double()
                exact, without = (
                    (s * h * allowed) @ doc.v / (s * h * allowed).sum(-1, keepdim=True)
                    for s in (similarity, similarity - p @ psi.mT)
                )
                square, total = square + float((without - exact).square().sum()), total + float(exact.square().sum())
            assert float(got) == pytest.approx(square / total, rel=0.05), row


def test_a_monomial_is_never_worth_much_more_than_the_output():
    q, k, v = uneven(4, d=3)
    docs = documents_of(9 * q, 9 * k, v)  # far beyond where the series converges
    basis = design.basis_of(docs, True)
    found = design.appraise(docs, basis, KERNELS["exp"], design.candidates(basis.spread, [100] * 3))
    assert all(bool(worth.isfinite().all()) and float(worth.max()) <= 0.1 for worth in found.worth)


@pytest.mark.parametrize("left", [0, 1, 4, 7, 50])
def test_the_budget_goes_where_it_pays_best(left):
    generator = torch.Generator().manual_seed(5)
    width, sizes = 3, (1, 3, 5, 4, 2)

    def head() -> design.Monomials:
        worth = [
            torch.rand(size, generator=generator, dtype=torch.float64).sort(descending=True).values for size in sizes
        ]
        worth[4][1] = 0.0
        return design.Monomials(tuple(torch.zeros(size, n) for n, size in enumerate(sizes)), tuple(worth))

    heads, errors = [head(), head()], (0.5, 0.02)
    counts = design.allocate(heads, errors, 1 + width + left)
    assert counts[:2] == (1, 3)
    assert sum(counts) <= 1 + width + left

    def pays(chosen: tuple[int, ...]) -> float:
        return sum(
            float(h.worth[n + 2][:c].sum()) / e**2
            for h, e in zip(heads, errors, strict=True)
            for n, c in enumerate(chosen)
        )

    possible = [c for c in itertools.product(range(6), range(5), range(3)) if sum(c) <= left]
    padded = (*counts[2:], 0, 0, 0)[:3]
    assert pays(padded) == pytest.approx(max(map(pays, possible)))
    # what pays nothing is not taken: the last one of degree 4 is worth 0 to one head only, so that all are
    assert sum(counts) == 1 + width + min(left, 11 - int(heads[0].worth[4][1] + heads[1].worth[4][1] == 0))


@pytest.mark.parametrize("floor", [0.0, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_the_truncation_is_the_error_of_the_features(causal, floor):
    q, k, v = uneven(6, n=25, d=3)
    docs = documents_of(2 * q, 2 * k, v, causal=causal)
    basis = design.basis_of(docs, True)
    kernel = KERNELS["exp"]
    axes = design.candidates(basis.spread, [100] * 8)
    squares, total = design.truncation(docs, basis, kernel, axes, floor)
    exact = [
        reference.kernel_attention(2 * x, 2 * y, z, kernel, is_causal=causal, scale=1.0)[0, 0]
        for x, y, z in zip(q.split(1), k.split(1), v.split(1), strict=True)
    ]
    assert total == pytest.approx(sum(float(out.square().sum()) for out in exact))
    rows = torch.ones(25, 1, dtype=torch.float64)
    shown = [0, 1, 3, 10]
    for degree in shown:
        wanted = 0.0
        for doc, out in zip(docs, exact, strict=True):
            h = (doc.y @ basis.q_centre).exp()[:, None]
            x, y = (doc.x - basis.q_centre) @ basis.q, (doc.y - basis.k_centre) @ basis.k
            phi_q, phi_k = (
                torch.cat(design.monomials(side, axes, kernel)[:degree][::-1], 1) if degree else rows for side in (x, y)
            )
            phi_k = phi_k * h if degree else phi_k
            got = reference.feature_attention(
                phi_q[None, None], phi_k[None, None], doc.v[None, None], is_causal=causal, floor=floor if degree else 0
            )
            wanted += float((got[0, 0] - out).square().sum())
        assert float(squares[degree]) == pytest.approx(wanted, rel=1e-6, abs=1e-12), degree


@pytest.mark.parametrize("radius", [0.5, 40.0, 3000.0])
@pytest.mark.parametrize("causal", [False, True])
def test_the_exact_output_is_that_of_the_oracle_at_any_radius(causal, radius):
    q, k, v = uneven(7, n=20)
    q, k = (x / x.norm(dim=-1, keepdim=True) * math.sqrt(radius) for x in (q, k))
    (doc, *_) = docs = documents_of(q, k, v, causal=causal)
    exact = design.Exact(doc, design.basis_of(docs, True), KERNELS["exp"])
    wanted = reference.softmax_attention(q, k, v, scale=1.0, is_causal=causal)[0, 0]
    torch.testing.assert_close(exact.out, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["inv", "log", "sqrt"])
def test_the_exact_output_of_kernels_that_are_not_centred(name):
    q, k, v = uneven(8, n=20)
    q, k = (0.9 * x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    (doc, *_) = docs = documents_of(q, k, v)
    exact = design.Exact(doc, design.basis_of(docs, False), KERNELS[name])
    wanted = reference.kernel_attention(q, k, v, KERNELS[name], scale=1.0)[0, 0]
    torch.testing.assert_close(exact.out, wanted, rtol=1e-9, atol=1e-11)


def test_documents_are_thinned_and_leave_out_padding(key_mask):
    generator = torch.Generator().manual_seed(9)
    x, y, v = (torch.randn(28, h, 300, 3, generator=generator) for h in (4, 2, 2))
    mask = key_mask("random", 300, 28)
    mask[5] = False
    for head in (0, 1):
        docs = design.documents(x, y, v, mask, True, head)
        assert design._DOCUMENTS - 1 <= len(docs) <= design._DOCUMENTS < 28
        for doc in docs:
            sample = next(b for b in range(28) if torch.equal(doc.y, y[b, head, mask[b]].double()))
            assert torch.equal(doc.v, v[sample, head, mask[sample]].double())
            assert len(doc.x) <= design._ROWS < 300
            group = x[sample, 2 * head : 2 * head + 2, mask[sample]].double()
            places = [(group == row).all(-1).nonzero()[0].tolist() for row in doc.x]
            assert {h for h, _ in places} == {0, 1}
            assert doc.allowed is not None
            assert doc.allowed.sum(-1).tolist() == [place + 1 for _, place in places]


def test_a_third_is_held_back():
    nothing = torch.empty(0, 1)
    docs = [design.Document(nothing, nothing, nothing) for _ in range(7)]
    learn, held = design.split(docs)
    assert held == [docs[2], docs[5]]
    assert learn == [docs[i] for i in (0, 1, 3, 4, 6)]
    assert design.split(docs[:2]) == (docs[:2], docs[:2])
