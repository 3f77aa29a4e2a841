"""The error of the attention output that random Maclaurin features will make, in closed form.

With d_j = h_j (v_j - o_i) / Z_i, row i of the output moves to first order by sum_j e_j d_j, where e_j is the error
of the similarity with key j and o_i, Z_i are exact. The errors of different keys are correlated, because all keys
meet the same directions: for one product of n Rademacher projections, in coordinates u of the query and w of the keys,

    E[prod <r, u>^2 <r, w_j> <r, w_l>] = c_jl^n,   c_jl = |u|^2 <w_j, w_l> + 2 t_j t_l - 2 sum_i u_i^2 w_ji w_li,

so that M_n of them with coefficient a_n / M_n add (a_n^2 / M_n) sum_jl (c_jl^n - t_j^n t_l^n) <d_j, d_l> to the
squared error, and M with random degrees of law P add (1 / M) (sum_n a_n^2 / P_n sum_jl c_jl^n <d_j, d_l> - |sum_j
f(t_j) d_j|^2), the sum f being over the degrees that are drawn.

Source: per pair, Kar & Karnick 2012 (arXiv 1201.6530) and Wacker, Kanagawa & Filippone 2022 (arXiv 2202.02031); the
covariance over keys is that of the same product, by pairing equal signs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .design import Basis, Document, Exact, shrunk, spread_evenly
from .kernels import Kernel
from .maps import MaclaurinMap

_ROWS = 12  # queries of a document whose keys are paired with each other, S^2 numbers each


class OutputMoments:
    """Sums over sampled rows of one head, per degree, from which every variance follows.

    Attributes:
        second: second[n] is the sum over rows and j, l of c_jl^n <d_j, d_l>.
        first: first[m, n] is the sum over rows of <sum_j t_j^m d_j, sum_l t_l^n d_l>.
        square: the sum over the same rows of |o_i|^2.

    Args:
        docs: documents of one key head.
        basis: in whose coordinates the signs are drawn.
        kernel: f.
        highest: degree up to which sums are made.

    Cost: rows x S^2 x (D + highest x Dv) multiply-adds.
    """

    def __init__(self, docs: Sequence[Document], basis: Basis, kernel: Kernel, highest: int) -> None:
        self.second = torch.zeros(highest + 1, dtype=torch.float64)
        self.first = torch.zeros(highest + 1, highest + 1, dtype=torch.float64)
        self.square = 0.0
        for doc in docs:
            exact = Exact(doc, basis, kernel)
            for i in spread_evenly(len(exact.u), _ROWS).tolist():
                self.square += float(exact.out[i].square().sum())
                self._add_row(exact, doc.v, i)

    def _add_row(self, exact: Exact, v: Tensor, i: int) -> None:
        u, w = exact.u[i], exact.w
        t = w @ u
        d = (exact.h * exact.allowed[i] / exact.total[i])[:, None] * (v - exact.out[i])
        c = (w * (u @ u - 2 * u * u)) @ w.mT + 2 * torch.outer(t, t)
        of_pairs, of_keys = torch.ones_like(c), torch.ones_like(t)
        shifts: list[Tensor] = []
        for n in range(len(self.second)):
            self.second[n] += ((of_pairs @ d) * d).sum()
            shifts.append(of_keys @ d)
            of_pairs, of_keys = of_pairs * c, of_keys * t
        moved = torch.stack(shifts)
        self.first += moved @ moved.mT

    def of_degree(self, degree: int) -> float:
        """Squared error, summed over the rows, of estimating t^n by one product of n projections."""
        return max(float(self.second[degree] - self.first[degree, degree]), 0.0)

    def of_law(self, kernel: Kernel, law: Mapping[int, float]) -> float:
        """Squared error, summed over the rows, of one feature whose degree is drawn from a law."""
        known = [n for n in law if n < len(self.second) and law[n] > 0]
        if not known:
            return 0.0
        a = torch.tensor([kernel.coefficient(n) for n in known], dtype=torch.float64)
        p = torch.tensor([law[n] for n in known], dtype=torch.float64)
        at = torch.tensor(known)
        return max(float((a * a / p * self.second[at]).sum() - a @ self.first[at][:, at] @ a), 0.0)


def predicted_rel_error(
    features: MaclaurinMap, docs: Sequence[Document], head: int, scale: float, highest: int = 12
) -> float:
    """Relative root mean square error of a key head's output that its features will make on these documents.

    What is exact in the features is compared with f on the sampled rows; what is random in them adds its variance.

    Args:
        features: the map, of all key heads.
        docs: of this key head, already multiplied by scale^(1/2).
        head: the key head.
        scale: of <q, k>.
        highest: degree up to which variances are summed.
    """
    kernel = features.kernel
    if features.is_exact():
        return math.sqrt(_of_exact(features, docs, head, scale))
    counts = features.drawn_counts()
    moments = OutputMoments(docs, features.basis(head, scale), kernel, max(highest, *counts, 0))
    square = sum(kernel.coefficient(n) ** 2 / m * moments.of_degree(n) for n, m in counts.items())
    number, law = features.drawn_law()
    if number:
        square += moments.of_law(kernel, law) / number
    return math.sqrt(square / max(moments.square, 1e-300))


def _of_exact(features: MaclaurinMap, docs: Sequence[Document], head: int, scale: float) -> float:
    square = total = 0.0
    basis = features.basis(head, scale)
    maps = features.maps(scale)
    heads, device = features.num_kv_heads, next((t.device for t in features.buffers()), torch.device("cpu"))
    for doc in docs:
        exact = Exact(doc, basis, features.kernel)
        phi_q, phi_k = (
            phi((x.to(device) / math.sqrt(scale)).expand(1, heads, -1, -1))[0, head].cpu()
            for phi, x in ((maps.of_queries, doc.x), (maps.of_keys, doc.y))
        )
        weights, constant = (
            (of_q @ of_k.mT) * exact.allowed for of_q, of_k in ((phi_q, phi_k), (phi_q[:, -1:], phi_k[:, -1:]))
        )
        out = shrunk(weights, constant, features.floor) @ doc.v
        square += float((out - exact.out).square().sum())
        total += float(exact.out.square().sum())
    return square / max(total, 1e-300)
