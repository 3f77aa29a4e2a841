"""Derivatives of the features of a block: from those of the features to those of x and of the map's tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..norms import EPS
from .fill import Filler, Part
from .spec import Side, Spec


class Deriver(Filler):
    """A ``Filler`` that carries derivatives back, and sums those of the tensors of its side over the blocks.

    Args:
        spec: as for ``Filler``.
        side: as for ``Filler``.
        batch: B.
        like: gives dtype and device.
        key: whether x are keys.
        wanted: which tensors of the side have a derivative, by name.
        log_scale: as for ``Filler``.
        chunks: as for ``Filler``.
    """

    def __init__(
        self,
        spec: Spec,
        side: Side,
        batch: int,
        like: Tensor,
        *,
        key: bool,
        wanted: frozenset[str] = frozenset(),
        log_scale: Tensor | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__(spec, side, batch, like, key=key, keeps=True, log_scale=log_scale, chunks=chunks)
        self._batch, self._chunks = batch, chunks
        self._wanted = wanted
        self._raw: Tensor | None = None
        self._sums = {
            name: torch.zeros_like(x)
            for name, x in zip(Side._fields, self._side, strict=True)
            if name in wanted and x is not None
        }

    def prepare(self, x: Tensor) -> Tensor:
        """As of a ``Filler``."""
        self._raw = x
        return super().prepare(x)

    def derivative(self, name: str) -> Tensor | None:
        """Of one tensor of the side, summed over all blocks and samples; None where it was not wanted."""
        found = self._sums.get(name)
        return None if found is None else found.unflatten(0, (self._batch, -1, self._chunks)).sum((0, 2))

    def backward(self, parts: list[Part], derivatives: list[Tensor], of_log_weight: Tensor | None = None) -> Tensor:
        """Derivative of x (R, n, D) from those of the features, in the layout of the parts; both are overwritten.

        In the log domain ``parts`` are the exponentials, and the derivatives those of the exponentials.

        Args:
            parts: what ``fill`` made, or ``exponentiate`` of it.
            derivatives: one per part, with the shape of its data.
            of_log_weight: (R, 1, n), of the logarithm of the weight of keys.
        """
        spec, x = self.spec, self._x
        assert x is not None
        phi, d = parts[-1].data, derivatives[-1]
        if spec.family == "identity":
            dx = d.mul_(spec.scale)
        elif spec.family == "elu":
            dx = d.mul_(phi.clamp_max_(1.0)).mul_(spec.scale)
        elif spec.family == "softmax":
            dx = d.mul_(phi).mul_(spec.scale)
        elif spec.family == "positive":
            du = d.mul_(phi)
            dx = self._through_projection(du, x)
            if self.key:
                dx.addcmul_(x, du.sum(1)[:, :, None], value=-spec.scale)
        elif spec.family == "fourier":
            half = phi.shape[1] // 2
            du = d[:, :half].mul_(phi[:, half:]).sub_(d[:, half:].mul_(phi[:, :half]))
            dx = self._through_projection(du, x)
        else:
            dx = self._of_products(d, derivatives[0] if spec.linear else None, of_log_weight, x)
        return self._through_norm(dx)

    def _of_products(self, d: Tensor, linear: Tensor | None, of_log_weight: Tensor | None, x: Tensor) -> Tensor:
        spec = self.spec
        if self._u is None:
            assert linear is not None
            return linear
        du = self.buffers.take("du", *self._u.shape)
        width = self._u.shape[1]
        if spec.gathered or not spec.ranks:
            du.zero_()
        else:
            du[:, spec.products + sum(spec.ranks[1:]) :].zero_()
        if spec.ranks:
            starts = [spec.products + sum(spec.ranks[1:rank]) for rank in range(1, len(spec.ranks))]
            for rank in reversed(range(1, len(spec.ranks))):
                count = spec.ranks[rank]
                prefix, factor = self._prefixes[rank - 1], self._factors[rank - 1]
                if spec.gathered:
                    self._scatter(du, prefix.mul_(d[:, :count]), rank)
                else:
                    torch.mul(prefix, d[:, :count], out=du[:, starts[rank - 1] : starts[rank - 1] + count])
                d[:, :count].mul_(factor)
            if spec.gathered:
                self._scatter(du, d, 0)
            else:
                du[:, : spec.products].copy_(d)
        if of_log_weight is not None:
            at = self._side.projection.shape[-1] - 1  # pyright: ignore[reportOptionalMemberAccess]
            du[:, at, None].add_(of_log_weight)
        return self._through_projection(du[:, :width], x, linear)

    def _scatter(self, du: Tensor, d: Tensor, rank: int) -> None:
        """Add the derivatives of the factors of one rank to the entries of u that they are."""
        if not hasattr(self, "_one_hot"):
            rows, width = du.shape[:2]
            self._one_hot = [
                torch.nn.functional.one_hot(index.view(rows, -1) % width, width).mT.to(du.dtype).contiguous()
                for index in self._index
            ]
        torch.baddbmm(du, self._one_hot[rank], d, out=du)

    def _through_projection(self, du: Tensor, x: Tensor, beside: Tensor | None = None) -> Tensor:
        """Derivative (R, n, D) of x, from that of u (R, P, n); added to what is there beside it."""
        assert self._matrix is not None
        if "projection" in self._sums:
            kept = self._sums["projection"]
            kept.baddbmm_(x.mT, du[:, : kept.shape[-1]].mT)
        if "offset" in self._sums:
            kept = self._sums["offset"]
            kept += du[:, : kept.shape[-1]].sum(-1)
        if beside is not None:
            return torch.baddbmm(beside, du.mT, self._matrix, out=beside)
        return torch.bmm(du.mT, self._matrix, out=self.buffers.take("dx", x.shape[0], x.shape[1], x.shape[2]))

    def _through_norm(self, d: Tensor) -> Tensor:
        spec, side = self.spec, self._side
        if "shift" in self._sums:
            self._sums["shift"] -= d.sum(1)
        if not spec.norm:
            return d
        x = self._x
        assert x is not None
        assert self._norms is not None
        if side.shift is not None:
            x = x + side.shift[:, None]
        kept = (self._norms > EPS).to(d.dtype)
        d = torch.addcmul(d, x, (x * d).sum(-1, keepdim=True) * kept, value=-1.0).div_(self._norms)
        if spec.norm == "token":
            return d.sub_(d.mean(-1, keepdim=True))
        if spec.norm == "batch":
            assert side.mean is not None
            assert side.variance is not None
            assert self._raw is not None
            root = (side.variance + EPS).rsqrt()
            if "variance" in self._sums:
                centred = self._raw - side.mean[:, None]
                self._sums["variance"] -= 0.5 * root**3 * (d * centred).sum(1)
            d = d * root[:, None]
            if "mean" in self._sums:
                self._sums["mean"] -= d.sum(1)
        return d
