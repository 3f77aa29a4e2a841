"""read: what all queries read from the sums, block by block, and its derivative.

    out_i = post(phi(q_i)^T kv / phi(q_i)^T z)

under the denominator policy and the floor of ``core.contract``; everything of a block stays in the cache but out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..algebra import accumulation_dtype, norm
from ..norms import EPS
from .buffers import Buffers
from .derive import Deriver
from .fill import Filler, Part
from .memory import like_queries
from .spec import Side, Spec
from .sums import DERIVED, grid, multiplied_in


class Finish(NamedTuple):
    """What turns a numerator and a denominator into out.

    Args:
        floor: least denominator, in shares of what the constant feature alone gives it; 0 for none.
        constant_kv: (B, H, Dv), what the constant feature gives every numerator; None without a floor.
        constant_z: (B, H), the same of every denominator.
        gamma: (H,) of ppSBN's second half; None without.
        beta: (H,).
    """

    floor: float = 0.0
    constant_kv: Tensor | None = None
    constant_z: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None


@dataclass
class Rows:
    """The sums as rows, cut by part, and what finishes a block of readings."""

    kv: list[Tensor]  # (R, F_i, Dv)
    z: list[Tensor]  # (R, 1, F_i)
    norm_bound: float  # the largest |z|, on the CPU
    finish: Finish  # its tensors are (R, 1, .)


def rows_of(
    kv: Tensor, z: Tensor, finish: Finish, widths: list[int], dtype: torch.dtype, values: torch.dtype | None = None
) -> Rows:
    """From sums (B, H, F, Dv) and (B, H, F); kv in the dtype of values, everything else in ``dtype``."""
    batch = kv.shape[0]
    kv, z = kv.flatten(0, 1).to(values or dtype), z.flatten(0, 1).to(dtype)

    def per_head(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).repeat(batch)[:, None, None]

    of_sums = norm(z)
    return Rows(
        [x.contiguous() for x in kv.split(widths, dim=1)],
        [x.contiguous() for x in z[:, None].split(widths, dim=2)],
        float(of_sums.max()) if of_sums.device.type == "cpu" else 0.0,
        Finish(
            finish.floor,
            None if finish.constant_kv is None else finish.constant_kv.flatten(0, 1).to(dtype)[:, None],
            None if finish.constant_z is None else finish.constant_z.flatten(0, 1).to(dtype)[:, None, None],
            per_head(finish.gamma),
            per_head(finish.beta),
        ),
    )


def widths_of(spec: Spec, head_dim: int, total: int) -> list[int]:
    """Features of each part."""
    if spec.family != "product" or not spec.linear:
        return [total]
    return [head_dim, total - head_dim]


def read(
    q: Tensor,  # (B, H, N, D)
    kv: Tensor,  # (B, H, F, Dv)
    z: Tensor,  # (B, H, F)
    log_scale: Tensor,  # (B, H, F or 0)
    finish: Finish,
    side: Side,
    spec: Spec,
    dtype: torch.dtype,
) -> Tensor:
    """Out (B, H, N, Dv) of this dtype, as ``memory.like_queries`` lays it."""
    cut = grid(q, spec, side, 2 * kv.shape[3])
    widths = widths_of(spec, q.shape[3], kv.shape[2])
    values = multiplied_in(q)
    rows = rows_of(kv, z, finish, widths, cut.dtype, values)
    half = None if values == cut.dtype else Buffers(values, q.device)
    like = q.new_empty(0, dtype=cut.dtype)
    logs = log_scale.flatten(0, 1) if log_scale.shape[-1] else None
    beside = rows.z[0][:, 0] if spec.linear else None
    filler = Filler(spec, side, q.shape[0], like, key=False, log_scale=logs, beside=beside)
    out = like_queries(q, kv.shape[3], dtype)
    flat = out.flatten(0, 1) if out.is_contiguous() else None
    for tokens in cut:
        parts = query_parts(filler, filler.prepare(cut.rows(q, tokens)), logs)
        shape = (q.shape[0] * q.shape[1], parts[0].by_feature.shape[2], kv.shape[3])
        read_by = filler.as_given(parts, q[:, :, tokens]) if half is not None else parts
        numerator = numerator_of(read_by, rows.kv, (half or filler.buffers).take("out", *shape))
        if half is not None and (finish.gamma is not None or finish.floor):
            numerator = numerator.to(cut.dtype)
        if spec.family == "identity":
            out[:, :, tokens] = numerator.unflatten(0, q.shape[:2])
            continue
        denominator = guarded(denominator_of(parts, rows.z, filler.beside), parts, rows, filler)
        settled = out.new_empty(shape) if flat is None else flat[:, tokens]
        settle(numerator, denominator, rows.finish, settled)
        if flat is None:
            out[:, :, tokens] = settled.unflatten(0, q.shape[:2])
    filler.close()
    if half is not None:
        half.close()
    return out


def query_parts(filler: Filler, x: Tensor, log_scale: Tensor | None) -> list[Part]:
    """Features of prepared queries; in the log domain over the largest of each row, the scale of the sums included."""
    parts = filler.fill(x)
    if not filler.spec.log_domain:
        return parts
    part = parts[0]
    if log_scale is not None and not part.tokens_last:
        part = Part(part.data + log_scale[:, None].to(part.data.dtype), False)
    top = part.data.amax(1 if part.tokens_last else 2, keepdim=True)
    return [filler.exponentiate(part, top.masked_fill_(top == -torch.inf, 0.0))]


def numerator_of(parts: list[Part], kv: list[Tensor], out: Tensor) -> Tensor:
    """(R, n, Dv)."""
    for i, (part, sums) in enumerate(zip(parts, kv, strict=True)):
        phi = part.by_feature.mT
        phi = phi if phi.dtype == sums.dtype else phi.to(sums.dtype)
        if i:
            torch.baddbmm(out, phi, sums, out=out)
        else:
            torch.bmm(phi, sums, out=out)
    return out


def denominator_of(parts: list[Part], z: list[Tensor], beside: Tensor | None) -> Tensor:
    """(R, 1, n); ``beside`` is the share of the first part, where it is known already."""
    total = beside
    for part, sums in list(zip(parts, z, strict=True))[beside is not None :]:
        found = torch.bmm(sums, part.by_feature)
        total = found if total is None else found.add_(total)
    assert total is not None
    return total


def guarded(denominator: Tensor, parts: list[Part], rows: Rows, filler: Filler) -> Tensor:
    """The denominators under the policy: those without a right digit are replaced by the least that has one."""
    limits = torch.finfo(denominator.dtype)
    if filler.spec.log_domain:  # sums of positive numbers, the largest of which is 1
        return torch.where(denominator == 0, torch.ones_like(denominator), denominator)
    if denominator.device.type == "cpu":
        # the norm of all features of the block costs little, and is more than that of any row
        most = math.sqrt(sum(square(part.data) for part in parts)) * rows.norm_bound
        if float(denominator.abs().min()) > max(8 * limits.eps * most, limits.tiny):
            return denominator
    # the sum of the magnitudes of the terms, which does not depend on how weights are shared between phi and z
    magnitude = torch.stack([z.abs() @ part.by_feature.abs() for part, z in zip(parts, rows.z, strict=True)]).sum(0)
    return protected(denominator, magnitude)


def protected(denominator: Tensor, magnitude: Tensor) -> Tensor:
    """Denominators below 8 units of rounding of their magnitude replaced by that; those of nothing by 1."""
    limits = torch.finfo(denominator.dtype)
    least = (magnitude * (8 * limits.eps)).clamp_min(limits.tiny)
    small, negative = denominator.abs() < least, denominator < 0
    safe = torch.where(small, torch.where(negative, -least, least), denominator)
    return torch.where((magnitude == 0) & (denominator == 0), torch.ones_like(safe), safe)


def square(x: Tensor) -> float:
    """Sum of the squares."""
    # not the norm of the whole, which is slow where it does not stand in one piece
    flat = (x if x.is_contiguous() else torch.linalg.vector_norm(x, dim=-1)).view(-1)
    return float(torch.dot(flat, flat))


def settle(numerator: Tensor, denominator: Tensor, finish: Finish, out: Tensor) -> None:
    """Write numerator (R, n, Dv) over denominator (R, 1, n) into out, floor and ppSBN's second half included."""
    denominator = denominator.mT
    if finish.constant_z is not None and finish.constant_kv is not None:
        short = denominator < finish.floor * finish.constant_z
        if out.device.type != "cpu" or bool(short.any()):
            numerator, denominator = lifted(numerator, denominator, finish)[:2]
    if finish.gamma is None or finish.beta is None:
        # a mixed division would first make copies in the wider dtype
        torch.div(numerator, denominator.to(numerator.dtype), out=out)
        return
    x = numerator.div_(denominator)
    out.copy_(root_of(x, finish.beta).mul_(x).mul_(finish.gamma))


def root_of(x: Tensor, beta: Tensor) -> Tensor:
    """(x^2 + eps)^((beta - 1) / 2); by exp and log, whose broadcast torch vectorises."""
    return torch.mul(x, x).add_(EPS).log_().mul_((beta - 1.0) / 2.0).exp_()


def lifted(numerator: Tensor, denominator: Tensor, finish: Finish) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numerator and denominator with the floor kept; where that took something, and the share that was kept."""
    assert finish.constant_z is not None
    assert finish.constant_kv is not None
    constant = finish.constant_z
    least = finish.floor * constant
    short = denominator < least
    missing = torch.where(short, constant - denominator, torch.ones_like(denominator))
    share = torch.where(short, (constant - least) / missing, torch.ones_like(denominator))
    return (
        torch.lerp(finish.constant_kv.expand_as(numerator), numerator, share),
        torch.where(short, least.expand_as(denominator), denominator),
        short,
        share,
    )


class ReadDerivatives(NamedTuple):
    """Of everything that ``read`` takes; None where there was none."""

    q: Tensor
    kv: Tensor
    z: Tensor
    constant_kv: Tensor | None
    constant_z: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    deriver: Deriver


def read_backward(
    d: Tensor,  # (B, H, N, Dv)
    q: Tensor,
    kv: Tensor,
    z: Tensor,
    log_scale: Tensor,
    finish: Finish,
    side: Side,
    spec: Spec,
    wanted: frozenset[str],
    out: Tensor | None = None,
) -> ReadDerivatives:
    """Derivatives, by making every block again; guarded denominators are taken as constant.

    ``out`` is what ``read`` gave; it saves the numerators where nothing stands between them and out.
    """
    cut = grid(q, spec, side, 3 * kv.shape[3], DERIVED)
    widths = widths_of(spec, q.shape[3], kv.shape[2])
    rows = rows_of(kv, z, finish, widths, cut.dtype)
    like = q.new_empty(0, dtype=cut.dtype)
    logs = log_scale.flatten(0, 1) if log_scale.shape[-1] else None
    deriver = Deriver(spec, side, q.shape[0], like, key=False, wanted=wanted, log_scale=logs)
    settled = Settled()
    of_constant = [
        None if x is None else torch.zeros_like(x, dtype=accumulation_dtype(cut.dtype)) for x in rows.finish[1:3]
    ]
    wide = accumulation_dtype(cut.dtype)
    of_kv, of_z = [torch.zeros_like(x, dtype=wide) for x in rows.kv], [torch.zeros_like(x, dtype=wide) for x in rows.z]
    dq = torch.empty_like(q)
    for tokens in cut:
        parts = query_parts(deriver, deriver.prepare(cut.rows(q, tokens)), logs)
        g = cut.rows(d, tokens)
        if spec.family == "identity":
            dn, dd = g, None
        elif out is not None and finish.gamma is None and finish.constant_z is None:
            raw = denominator_of(parts, rows.z, None)
            safe = guarded(raw, parts, rows, deriver)
            dn = torch.div(g, safe.mT, out=deriver.buffers.take("dn", *g.shape))
            product = torch.mul(dn, cut.rows(out, tokens), out=deriver.buffers.take("product", *g.shape))
            dd = product.sum(-1)[:, None].neg_()
            if safe is not raw:
                dd *= safe == raw
        else:
            numerator = numerator_of(parts, rows.kv, deriver.buffers.take("out", *g.shape))
            raw = denominator_of(parts, rows.z, None)
            safe = guarded(raw, parts, rows, deriver)
            dn, dd = settled.backward(g, numerator, safe, raw, rows.finish)
            for total, found in zip(of_constant, (settled.of_constant_kv, settled.of_constant_z), strict=True):
                if total is not None and found is not None:
                    total += found.sum(1, keepdim=True)
        derivatives: list[Tensor] = []
        for i, part in enumerate(parts):
            _add(of_kv[i], part.by_feature, dn)
            of_part = deriver.buffers.take(f"d{i}", *part.data.shape)
            if part.tokens_last:
                torch.bmm(rows.kv[i], dn.mT, out=of_part)
            else:
                torch.bmm(dn, rows.kv[i].mT, out=of_part)
            if dd is not None:
                of_z[i] += torch.bmm(dd, part.by_feature.mT)
                if part.tokens_last:
                    torch.baddbmm(of_part, rows.z[i].mT, dd, out=of_part)
                else:
                    torch.baddbmm(of_part, dd.mT, rows.z[i], out=of_part)
            derivatives.append(of_part)
        dq[:, :, tokens] = deriver.backward(parts, derivatives).unflatten(0, q.shape[:2])
    deriver.close()
    shape = q.shape[:2]
    gamma, beta = settled.derivatives(q.shape[0])
    return ReadDerivatives(
        dq,
        torch.cat(of_kv, dim=1).unflatten(0, shape),
        torch.cat(of_z, dim=2)[:, 0].unflatten(0, shape),
        None if of_constant[0] is None else of_constant[0][:, 0].unflatten(0, shape),
        None if of_constant[1] is None else of_constant[1][:, 0, 0].unflatten(0, shape),
        gamma,
        beta,
        deriver,
    )


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    if total.dtype == a.dtype:
        torch.baddbmm(total, a, b, out=total)
    else:
        total.add_(torch.bmm(a, b))


class Settled:
    """Derivative of ``settle``.

    Attributes:
        of_constant_kv: (R, n, Dv), of what the constant feature gives the numerators of the last block, with a floor.
        of_constant_z: (R, n, 1), the same of the denominators.
    """

    def __init__(self) -> None:
        self.of_constant_kv: Tensor | None = None
        self.of_constant_z: Tensor | None = None
        self._gamma: Tensor | None = None  # (B H,), summed over blocks
        self._beta: Tensor | None = None

    def backward(
        self, d: Tensor, numerator: Tensor, safe: Tensor, raw: Tensor, finish: Finish, chunks: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Derivatives of numerator (R, n, Dv) and raw denominator (R, 1, n), from that of out."""
        same = (safe == raw).mT
        denominator, first = safe.mT, numerator
        short = share = None
        if finish.constant_z is not None:
            first, denominator, short, share = lifted(numerator, denominator, finish)
        x = first / denominator
        if finish.gamma is not None and finish.beta is not None:
            square = x * x + EPS
            root = root_of(x, finish.beta)
            dx = d * root
            of_gamma = (dx * x).sum((1, 2)).unflatten(0, (-1, chunks)).sum(1)
            of_beta = (
                ((dx * x * square.log()).sum((1, 2)) * (0.5 * finish.gamma)[:, 0, 0]).unflatten(0, (-1, chunks)).sum(1)
            )
            self._gamma = of_gamma if self._gamma is None else self._gamma + of_gamma
            self._beta = of_beta if self._beta is None else self._beta + of_beta
            d = dx.mul_(1.0 + (finish.beta - 1.0) * (x * x / square)).mul_(finish.gamma)
        dn = d / denominator
        dd = -(dn * x).sum(-1, keepdim=True)
        if short is None or share is None:
            return dn, (dd * same).mT
        assert finish.constant_kv is not None
        assert finish.constant_z is not None
        # n' = n0 + s (n - n0), d' = f d0 with s = (1 - f) d0 / (d0 - d) in short rows
        of_share = (dn * (numerator - finish.constant_kv)).sum(-1, keepdim=True) * short
        missing = torch.where(short, finish.constant_z - safe.mT, torch.ones_like(safe.mT))
        of_constant = of_share * (share / finish.constant_z - share / missing) + dd * short * finish.floor
        self.of_constant_kv = (1.0 - share) * dn
        self.of_constant_z = torch.where(short, of_constant, torch.zeros_like(of_constant))
        of_raw = torch.where(short, of_share * share / missing, dd)
        return dn * share, (of_raw * same).mT

    def derivatives(self, batch: int) -> tuple[Tensor | None, Tensor | None]:
        """Of gamma and beta, (H,)."""
        gamma, beta = (None if x is None else x.unflatten(0, (batch, -1)).sum(0) for x in (self._gamma, self._beta))
        return gamma, beta
