"""What the kernels share: products in one of four precisions, loads of blocks of tokens, features and their gradients.

A feature map is a tuple ``f`` of (w, degrees, coefficients, centre, weight, head stride and rank stride of w, square,
offset); ``launch.FeatureMap`` says what each is. ``FAMILY`` chooses among

    0  phi_m = coefficient_m prod_{r < degree_m} <w_rm, x>, times exp(<weight, x>) where there is a weight
    1  log phi_m = <w_m, x> - square |x|^2 / 2 - offset
    2  log phi_m = x_m square, with M = D

and x stands for x - centre where there is one. ``MODE`` is how blocks are multiplied: 0 bfloat16, 1 bfloat16 as the
interpreter has to spell it, 2 tf32, 3 three products of tf32 that together have the digits of float32.
"""

# pyright: basic, reportMissingImports=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

PRODUCTS, POSITIVE, CHANNEL = 0, 1, 2
BFLOAT16, BFLOAT16_INTERPRETED, TF32, FLOAT32 = 0, 1, 2, 3


@triton.jit
def operand(a, MODE: tl.constexpr):
    """A block as products take it."""
    if MODE == 0:
        return a.to(tl.bfloat16)
    elif MODE == 1:  # round to nearest even by hand: the interpreter truncates, and multiplies bfloat16 as integers
        bits = a.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return bits.to(tl.float32, bitcast=True)
    else:
        return a.to(tl.float32)


@triton.jit
def product(a, b, MODE: tl.constexpr):
    """a @ b with float32 sums."""
    if MODE == 2:
        return tl.dot(operand(a, MODE), operand(b, MODE), input_precision="tf32")
    elif MODE == 3:
        return tl.dot(operand(a, MODE), operand(b, MODE), input_precision="tf32x3")
    else:
        return tl.dot(operand(a, MODE), operand(b, MODE), input_precision="ieee")


@triton.jit
def finite(log_scale):
    """A scale that can be subtracted: minus infinity, the scale of nothing, becomes 0."""
    return tl.where(log_scale == -float("inf"), 0.0, log_scale)


@triton.jit
def load_block(x, batch, head, tokens, live, e, E):
    """Rows ``tokens`` (int64) of x, a tuple of pointer and four strides; 0 beyond ``live`` and beyond width E."""
    start = x[0] + batch * x[1] + head * x[2]
    return tl.load(start + tokens[:, None] * x[3] + e[None, :] * x[4], mask=live[:, None] & (e < E)[None, :], other=0.0)


@triton.jit
def store_block(x, value, batch, head, tokens, live, e, E, MODE: tl.constexpr):
    """Write rows ``tokens`` of x, rounded to its dtype."""
    start = x[0] + batch * x[1] + head * x[2]
    if x[0].dtype.element_ty == tl.bfloat16:
        value = operand(value, MODE)  # rounded by hand where the interpreter would truncate
    place = start + tokens[:, None] * x[3] + e[None, :] * x[4]
    tl.store(place, value.to(x[0].dtype.element_ty), mask=live[:, None] & (e < E)[None, :])


@triton.jit
def load_row(x, row, tokens, live, other):
    """Numbers of tokens from a contiguous (rows, N) of which ``row`` is the offset of one."""
    return tl.load(x + row + tokens, mask=live, other=other)


@triton.jit
def centred(x, f, head, d, D):
    """X minus the centre of this key head, in float32; x as it is where there is none."""
    if f[3] is not None:
        return x.to(tl.float32) - tl.load(f[3] + head * D + d, mask=d < D, other=0.0)[None, :]
    else:
        return x


@triton.jit
def load_w(f, head, rank, d, D, m, M):
    """(BD, BM) of the projections of one rank."""
    start = f[0] + head * f[5] + rank * f[6]
    return tl.load(start + d[:, None] * M + m[None, :], mask=(d < D)[:, None] & (m < M)[None, :], other=0.0)


@triton.jit
def exponent(x, f, head, d, D):
    """<weight, x> of each token, not yet clamped."""
    weight = tl.load(f[4] + head * D + d, mask=d < D, other=0.0)
    return tl.sum(x.to(tl.float32) * weight[None, :], 1)


@triton.jit
def projected(x, f, head, rank, d, D, m, M, NONZERO: tl.constexpr, MODE: tl.constexpr):
    """<w_rm, x> for the features of degree above ``rank``; with NONZERO kept so far from 0 that it divides."""
    u = product(x, load_w(f, head, rank, d, D, m, M), MODE)
    if NONZERO:
        u = tl.where(tl.abs(u) < 1e-18, 1e-18, u)
    return u


@triton.jit
def features(x, f, head, d, D, m, M, NONZERO: tl.constexpr, FAMILY: tl.constexpr, MODE: tl.constexpr):
    """Features (BT, BM) of a block x (BT, BD), or their logarithms; padded features are 0, or minus infinity."""
    if FAMILY == 0:
        degree = tl.load(f[1] + m, mask=m < M, other=0)
        coefficient = tl.load(f[2] + head * M + m, mask=m < M, other=0.0)
        phi = tl.zeros((x.shape[0], m.shape[0]), tl.float32) + coefficient[None, :]
        for rank in range(tl.max(degree, 0)):
            u = projected(x, f, head, rank, d, D, m, M, NONZERO, MODE)
            phi = phi * tl.where((rank < degree)[None, :], u, 1.0)
        if f[4] is not None:
            bounded = tl.minimum(tl.maximum(exponent(x, f, head, d, D), -60.0), 60.0)
            phi = phi * tl.exp(bounded)[:, None]
        return phi
    elif FAMILY == 1:
        w = load_w(f, head, 0, d, D, m, M)
        log_phi = product(x, w, MODE)
        if MODE <= 1:  # an exponent needs more digits of w than bfloat16 has: add the product with what was cut off
            log_phi += product(x, w - operand(w, MODE).to(tl.float32), MODE)
        wide = x.to(tl.float32)
        log_phi -= (0.5 * f[7] * tl.sum(wide * wide, 1) + f[8])[:, None]
        return tl.where((m < M)[None, :], log_phi, -float("inf"))
    else:
        return tl.where((m < M)[None, :], x.to(tl.float32) * f[7], -float("inf"))


@triton.jit
def features_backward(x, phi, grad, f, head, d, D, m, M, FAMILY: tl.constexpr, MODE: tl.constexpr):
    """Gradient (BT, BD) of x from that of the features, or, where FAMILY has logarithms, from that of these.

    ``phi`` are features made with NONZERO, so that the others' product is phi over one projection.
    """
    if FAMILY == 0:
        degree = tl.load(f[1] + m, mask=m < M, other=0)
        dx = tl.zeros((x.shape[0], d.shape[0]), tl.float32)
        through = grad * phi
        for rank in range(tl.max(degree, 0)):
            u = projected(x, f, head, rank, d, D, m, M, True, MODE)
            du = tl.where((rank < degree)[None, :], through / u, 0.0)
            dx += product(du, tl.trans(load_w(f, head, rank, d, D, m, M)), MODE)
        if f[4] is not None:
            inside = tl.abs(exponent(x, f, head, d, D)) <= 60.0
            weight = tl.load(f[4] + head * D + d, mask=d < D, other=0.0)
            dx += tl.where(inside, tl.sum(through, 1), 0.0)[:, None] * weight[None, :]
        return dx
    elif FAMILY == 1:
        dx = product(grad, tl.trans(load_w(f, head, 0, d, D, m, M)), MODE)
        return dx - (f[7] * tl.sum(grad, 1))[:, None] * x.to(tl.float32)
    else:
        return grad * f[7]
