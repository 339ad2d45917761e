"""PyTorch's kernels or, where these are inexact, operations on pieces that stay in the cache."""

import functools
import math
from collections.abc import Sequence
from typing import Any

from keras_norm import functional
from keras_norm._arrays import tensor
from keras_norm._kernels_common import (
    FARTHEST_MEAN,
    FEWEST_CHANNELS_FUSED,
    can_be_looked_at,
    folds_of,
)
from keras_norm.autodiff import custom_vjp, in_transform

Array = Any
Axis = int | Sequence[int]

# Elements of a piece that PyTorch sums in two passes: 4 MB in float32. Fewer cost more calls.
ELEMENTS_OF_PIECE = 2**20
# With fewer elements, looking whether the means are near 0 takes as long as a second pass.
FEWEST_ELEMENTS_OF_INFERENCE = 2**19
# PyTorch's kernel, too, adds up numbers one after the other: for more rows than this, the
# statistics of parts are merged. (With 262,144 rows at once, the variance is off by 7e-5; with
# 16,384 by 4e-6, and a mean of 25 standard deviations by 1e-4 of them.)
ROWS_AT_ONCE = 2**14
# Equal parts are sought among numbers of parts up to this many times the least one.
MOST_PARTS = 8
# PyTorch's norm also adds up squares one after the other: for this many it is off by 3e-7.
LONGEST_NORM = 2**14
# And the kernel of layer normalization's gradient adds up the rows for gamma: for 262,144 it is off
# by 2e-5, with parts of this many by 6e-7.
ROWS_OF_A_SUM = 2**10
# With fewer elements, PyTorch's RMS normalization is as fast as ours.
FEWEST_ELEMENTS_OF_RMS = 2**17


class Pieces:
    """An array as rows with the channels on axis 1, and cut along the rows into pieces.

    Channels on the last axis: (N, ..., C) -> (M / f, f C), f rows side by side if there are few
    channels; else the channels are moved to axis 1, and the positions merged if an axis has size
    1: such an axis can have several layouts in memory, and for some of them PyTorch 2.13's
    backward pass gives wrong gradients.

    Args:
        shape: of the array, without an axis of size 0.
        channel: the axis of the channels, >= 0.
    """

    def __init__(self, shape: Sequence[int], channel: int) -> None:
        self.channels, ndim = shape[channel], len(shape)
        self.last = channel == ndim - 1
        few = self.last and ndim > 2 and self.channels < FEWEST_CHANNELS_FUSED
        self.folds = folds_of(shape, self.channels) if few else 1
        self.channel = channel
        others = [n for axis, n in enumerate(shape) if axis != channel]
        self.merged = not self.last and len(others) > 2 and 1 in others
        self.trailing = 1 if self.merged else ndim - 2
        self.as_it_is = channel == 1 and not self.merged
        self.elements = math.prod(others)
        self.at_once = self.folds == 1 and 1 < self.elements <= ROWS_AT_ONCE

    @functools.cached_property
    def parts(self) -> int:
        """The number of parts, equal and of at most `ROWS_AT_ONCE` rows; 0 if none is found.

        Only with the channels last: such rows lie side by side in memory as they are.
        """
        least = -(-self.elements // ROWS_AT_ONCE)
        several = range(least, MOST_PARTS * least + 1) if self.last and self.folds == 1 else ()
        return next((n for n in several if self.elements % n == 0), 0)

    def rows(self, x: Array) -> Array:
        if self.as_it_is:
            return x
        if self.last:
            return x.reshape(-1, self.folds * self.channels)
        z = x.movedim(self.channel, 1)
        return z.flatten(2) if self.merged else z

    def undo(self, z: Array, x: Array) -> Array:
        if self.as_it_is:
            return z
        if self.last:
            return z.reshape(x.shape)
        if self.merged:
            z = z.unflatten(2, x.movedim(self.channel, 1).shape[2:])
        return z.movedim(1, self.channel)

    def cut(self, *arrays: Array) -> Any:
        if arrays[0].numel() <= ELEMENTS_OF_PIECE:
            return [arrays]
        size = max(1, arrays[0][:1].numel())
        return zip(*(z.split(max(1, ELEMENTS_OF_PIECE // size)) for z in arrays), strict=True)

    def row(self, v: Array) -> Array:
        """(C,) -> an array that broadcasts against the rows."""
        v = v.repeat(self.folds) if self.folds > 1 else v
        return v if self.last else v.reshape(-1, *[1] * self.trailing)

    def sum(self, z: Array) -> Array:
        """The sums of one piece, (C,)."""
        sums = z.sum(dim=(0, *range(2, z.ndim)))
        return sums if self.folds == 1 else sums.view(self.folds, self.channels).sum(0)


def batch(
    x: Array, gamma: Array | None, beta: Array | None, axis: Axis, epsilon: float
) -> tuple[Array, Array, Array]:
    """(y, mean, variance) of batch normalization, with the channels on any one axis."""
    (channel,) = functional.canonical_axes(axis, x.ndim)
    gamma, beta = (None if v is None else tensor(v, x.dtype) for v in (gamma, beta))
    if x.numel() == 0 or not can_be_looked_at(x):
        y, *statistics = functional.batch_normalization(x, gamma, beta, axis=axis, epsilon=epsilon)
        mean, variance = (v.detach() for v in statistics)
        return y, mean, variance
    return batch_of(Pieces(x.shape, channel), x, gamma, beta, epsilon)


def batch_of(
    pieces: Pieces, x: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> tuple[Array, Array, Array]:
    """As `batch`, for an x with values and elements; gamma and beta have its dtype."""
    if pieces.at_once:
        y, mean, variance, inv_std = _native_at_once(pieces.rows(x), gamma, beta, epsilon)
        if _is_near(mean, inv_std):
            return pieces.undo(y, x), mean, variance * (1 - 1 / pieces.elements)
    return _native_in_pieces(x, gamma, beta, epsilon, pieces)


def _native_at_once(
    z: Array, gamma: Array | None, beta: Array | None, epsilon: float
) -> tuple[Array, Array, Array, Array]:
    """(y, mean, unbiased variance, inv_std); channels on axis 1. The gradient is the kernel's."""
    import torch

    mean, variance = z.new_zeros((2, z.shape[1])).unbind()
    momentum = 1.0  # PyTorch's, of the new value: the moving statistics become those of the batch
    y, _, inv_std = torch.native_batch_norm(z, gamma, beta, mean, variance, True, momentum, epsilon)
    return y, mean, variance, inv_std


def _is_near(mean: Array, inv_std: Array) -> bool:
    import torch

    if not mean.numel():
        return True
    farthest = torch.linalg.vector_norm(mean * inv_std, math.inf)
    return bool(farthest.item() <= FARTHEST_MEAN)  # False for NaN


def _native_in_pieces(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
    pieces: Pieces,
) -> tuple[Array, Array, Array]:
    import torch

    axis = pieces.channel

    def forward(x: Array, gamma: Array | None, beta: Array | None) -> tuple[Any, Any]:
        if torch.is_grad_enabled():  # for a second derivative
            outputs, residuals = functional.batch_normalization_forward(
                x, gamma, beta, axis=axis, epsilon=epsilon
            )
            return outputs, residuals[:4]
        z = pieces.rows(x)
        y, mean, variance, inv_std = _forward_in_pieces(z, gamma, beta, epsilon, pieces)
        return (pieces.undo(y, x), mean, variance), (x, mean, inv_std, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array, Array]:
        x, mean, inv_std, gamma = residuals
        dy = upstream[0]
        if torch.is_grad_enabled():
            zeros = torch.zeros_like(mean)
            return functional.batch_normalization_backward(
                dy, zeros, zeros, x, mean, inv_std, gamma, axis=axis
            )
        z, dz = pieces.rows(x), pieces.rows(dy)
        if pieces.folds > 1:
            dx, dgamma, dbeta = _backward_in_pieces(z, dz, mean, inv_std, gamma, pieces)
        else:
            dx, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
                dz, z, gamma, None, None, mean, inv_std, True, epsilon, [True, True, True]
            )
        return pieces.undo(dx, x), dgamma, dbeta

    y, mean, variance = custom_vjp(forward, backward, x, gamma, beta)
    return y, mean.detach(), variance.detach()


def _forward_in_pieces(
    z: Array, gamma: Array | None, beta: Array | None, epsilon: float, pieces: Pieces
) -> tuple[Array, Array, Array, Array]:
    """(y, mean, variance, inv_std)."""
    import torch

    if pieces.folds == 1:
        mean, variance = _moments_by_kernel(z, pieces)
        inv_std = torch.rsqrt(variance + epsilon)  # (B3)
        if _is_near(mean, inv_std):
            y, *_ = torch.native_batch_norm(z, gamma, beta, mean, variance, False, 0.0, epsilon)
            return y, mean, variance, inv_std
    mean, variance = _moments_in_pieces(z, pieces)
    inv_std = torch.rsqrt(variance + epsilon)
    return _normalize_in_pieces(z, mean, inv_std, gamma, beta, pieces), mean, variance, inv_std


def _moments_by_kernel(z: Array, pieces: Pieces) -> tuple[Array, Array]:
    """(B1) and (B2), (C,), merged from those of parts, for means that are not far from 0."""
    import torch

    if pieces.parts:
        # As many rows side by side as there are parts: one call computes the moments of all.
        side_by_side = z.reshape(-1, pieces.parts * pieces.channels)
        moments = torch.batch_norm_update_stats(side_by_side, None, None, 0.0)
        means, variances = (v.view(pieces.parts, pieces.channels) for v in moments)
        mean = means.mean(0)  # (B14)
        rest = means - mean
        return mean, torch.addcmul(variances, rest, rest).mean(0)  # (B15)
    rows = pieces.elements // len(z)  # of an entry of z: the positions of one image, or 1
    parts = z.split(max(1, min(ROWS_AT_ONCE, ELEMENTS_OF_PIECE // pieces.channels) // rows))
    moments = [torch.stack(torch.batch_norm_update_stats(p, None, None, 0.0)) for p in parts]
    means, variances = torch.stack(moments, dim=1)  # (parts, C)
    share = z.new_tensor([len(p) / len(z) for p in parts])[:, None]
    mean = (share * means).sum(0)  # (B14); a product of matrices would be rounded by autocast
    return mean, (share * (variances + (means - mean) ** 2)).sum(0)  # (B15)


def _moments_in_pieces(z: Array, pieces: Pieces) -> tuple[Array, Array]:
    """(B1) and (B2), (C,); the second pass over a piece finds it in the cache."""
    n = pieces.elements
    first = pieces.sum(z) / n
    row = pieces.row(first)
    rest: Array = 0
    squares: Array = 0
    for (piece,) in pieces.cut(z):
        centered = piece - row
        rest = rest + pieces.sum(centered)  # what the mean lost to rounding
        squares = squares + pieces.sum(centered.square_())
    rest = rest / n
    return first + rest, (squares / n - rest * rest).relu()


def _normalize_in_pieces(
    z: Array,
    mean: Array,
    inv_std: Array,
    gamma: Array | None,
    beta: Array | None,
    pieces: Pieces,
) -> Array:
    """(B4) and (B5); x - mean first: x scale - mean scale is inexact for means far from 0."""
    import torch

    mean, scale = pieces.row(mean), pieces.row(inv_std if gamma is None else inv_std * gamma)
    offset = None if beta is None else pieces.row(beta)
    if z.numel() <= ELEMENTS_OF_PIECE:
        y = z - mean
        return y.mul_(scale) if offset is None else torch.addcmul(offset, y, scale, out=y)
    y = torch.empty_like(z)
    for piece, target in pieces.cut(z, y):
        torch.sub(piece, mean, out=target)
        if offset is None:
            target.mul_(scale)
        else:
            torch.addcmul(offset, target, scale, out=target)
    return y


def _backward_in_pieces(
    z: Array, dz: Array, mean: Array, inv_std: Array, gamma: Array | None, pieces: Pieces
) -> tuple[Array, Array, Array]:
    """(B6) to (B10) for folded rows."""
    import torch

    row, n = pieces.row(mean), pieces.elements
    dbeta = dgamma = 0
    for piece, dpiece in pieces.cut(z, dz):
        dbeta = dbeta + pieces.sum(dpiece)  # (B6)
        dgamma = dgamma + pieces.sum((piece - row).mul_(dpiece))
    dgamma = dgamma * inv_std  # (B7)
    scale = inv_std if gamma is None else inv_std * gamma
    a, b = pieces.row(-scale * dbeta / n), pieces.row(-scale * inv_std * dgamma / n)  # (B8) (B9)
    scale = pieces.row(scale)
    dx = torch.empty_like(z)
    for piece, dpiece, target in pieces.cut(z, dz, dx):
        torch.sub(piece, row, out=target)
        torch.addcmul(a, target, b, out=target).addcmul_(dpiece, scale)  # (B10)
    return dx, dgamma, dbeta


def records() -> bool:
    """Whether PyTorch records what gradients will need."""
    import torch

    return torch.is_grad_enabled()


def inference(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    axis: Axis,
    epsilon: float,
) -> Array:
    """y by given statistics, with the channels on any one axis."""
    import torch

    if torch.is_grad_enabled() or in_transform():  # for a second derivative; nothing in place
        return functional.normalize(x, mean, variance, gamma, beta, axis=axis, epsilon=epsilon)
    (channel,) = functional.canonical_axes(axis, x.ndim)
    if x.numel() == 0:
        return x.clone()
    return inference_of(Pieces(x.shape, channel), x, mean, variance, gamma, beta, epsilon)


def inference_of(
    pieces: Pieces,
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None,
    beta: Array | None,
    epsilon: float,
) -> Array:
    """As `inference`, for an x with elements, while no gradients are recorded."""
    import torch

    inv_std, z = torch.rsqrt(variance + epsilon), pieces.rows(x)
    large = pieces.folds == 1 and x.numel() >= FEWEST_ELEMENTS_OF_INFERENCE
    if large and can_be_looked_at(x) and _is_near(mean, inv_std):
        # One pass, x scale + (beta - mean scale).
        y, *_ = torch.native_batch_norm(z, gamma, beta, mean, variance, False, 0.0, epsilon)
    else:
        y = _normalize_in_pieces(z, mean, inv_std, gamma, beta, pieces)
    return pieces.undo(y, x)


def layer(
    x: Array, gamma: Array | None, beta: Array | None, axes: int, epsilon: float, centers: bool
) -> Array | None:
    """Layer normalization (RMS without `centers`) of the last axes; None if it would be inexact."""
    import torch

    functional.check_epsilon(epsilon)
    gamma, beta = (_native_parameter(v, x, x.shape[-axes:]) for v in (gamma, beta))
    if can_be_looked_at(x):
        return rows(x, gamma, beta, x.shape[-axes:], epsilon, centers)
    return None if centers else torch.nn.functional.rms_norm(x, x.shape[-axes:], gamma, epsilon)


def rows(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    sizes: Sequence[int],
    epsilon: float,
    centers: bool,
) -> Array | None:
    """As `layer`, for an x with values; gamma and beta have its last sizes and its dtype."""
    import torch

    if centers:
        y, mean, inv_std = torch.native_layer_norm(x, sizes, gamma, beta, epsilon)
        return y if _is_near(mean, inv_std) else None
    small = x.numel() < FEWEST_ELEMENTS_OF_RMS
    forward_mode = getattr(torch.autograd.forward_ad, "_current_level", -1) >= 0
    if small or forward_mode:  # which `custom_vjp` does not support
        return torch.nn.functional.rms_norm(x, sizes, gamma, epsilon)
    return _rms(x, gamma, len(sizes), epsilon)


def _rms(x: Array, gamma: Array | None, axes: int, epsilon: float) -> Array:
    """RMS normalization of the last axes.

    PyTorch composes its own from differentiable operations; the kernel of layer normalization's
    gradient, with all means set to 0, does most of it at once.
    """
    import torch

    over, sizes = tuple(range(-axes, 0)), x.shape[-axes:]
    elements = sizes.numel()

    def forward(x: Array, gamma: Array | None) -> tuple[Any, Any]:
        in_place = not torch.is_grad_enabled()  # else for a second derivative
        if in_place and elements <= LONGEST_NORM:
            norm = torch.linalg.vector_norm(x, dim=over, keepdim=True)
            mean_square = norm * norm / elements  # (R1)
        else:
            mean_square = (x * x).mean(dim=over, keepdim=True)
        inv_rms = torch.rsqrt(mean_square + epsilon)  # (R2)
        y = x * inv_rms  # (R3)
        if gamma is not None:
            y = y.mul_(gamma) if in_place else y * gamma  # (R4)
        return (y,), (x, inv_rms, gamma)

    def backward(residuals: Any, upstream: Any) -> tuple[Array, Array | None]:
        (x, inv_rms, gamma), (dy,) = residuals, upstream
        if torch.is_grad_enabled():
            x_hat, g = x * inv_rms, dy if gamma is None else dy * gamma
            along = (g * x_hat).mean(dim=over, keepdim=True)
            return (g - x_hat * along) * inv_rms, (dy * x_hat).sum_to_size(sizes)  # (R6) (R5)
        x_, dy_ = (v.reshape(-1, *sizes) for v in (x, dy))
        inv_rms = inv_rms.reshape(-1, *[1] * axes)
        dx, dgammas = torch.empty_like(x_), []
        share = (torch.ones(sizes, dtype=x.dtype) if gamma is None else gamma).flatten() / elements
        each = (v.split(ROWS_OF_A_SUM) for v in (dy_, x_, inv_rms, dx))
        with torch.autocast("cpu", enabled=False):  # which would round the product of matrices
            for dy, x_of_part, inv_std, target in zip(*each, strict=True):
                zero, asked = torch.zeros_like(inv_std), [True, gamma is not None, False]
                part, dgamma, _ = torch.ops.aten.native_layer_norm_backward(
                    dy, x_of_part, sizes, zero, inv_std, gamma, None, asked
                )
                # In layer normalization, dx is smaller by inv_std mean(gamma dy), (L9).
                of_g = torch.mv(dy.flatten(1), share).view(inv_std.shape)
                torch.add(part, inv_std * of_g, out=target)
                dgammas.append(dgamma)
        return dx.view(x.shape), None if gamma is None else torch.stack(dgammas).sum(0)

    (y,) = custom_vjp(forward, backward, x, gamma)
    return y


def _native_parameter(v: Array | None, x: Array, sizes: Sequence[int]) -> Array | None:
    if v is None:
        return None
    v = tensor(v, x.dtype)
    return v if v.shape == sizes else v.expand(sizes)


def group(
    x: Array, gamma: Array | None, beta: Array | None, groups: int, epsilon: float
) -> Array | None:
    """Group normalization of the last axis' channels; None if it would be inexact."""
    import torch

    functional.check_epsilon(epsilon)
    if not can_be_looked_at(x) or not x.numel():
        return None
    channels = x.shape[-1]
    gamma, beta = (_native_parameter(v, x, (channels,)) for v in (gamma, beta))
    x = _always_differentiated(x, gamma, beta)
    z = x.movedim(-1, 1)  # (N, C, ...); for images it is the layout "channels last", no copy
    if gamma is None:
        gamma = z.new_ones(channels)  # with only beta, derivatives fail in PyTorch 2.13
    z = z.contiguous(memory_format=_layout(z))
    y, mean, inv_std = torch.native_group_norm(
        z, gamma, beta, len(z), channels, z[0, 0].numel(), groups, epsilon
    )
    return y.movedim(1, -1) if _is_near(mean.detach(), inv_std.detach()) else None


def _always_differentiated(x: Array, gamma: Array | None, beta: Array | None) -> Array:
    """x, as if it depended on gamma and beta, so that their gradients always require that of x.

    In PyTorch 2.13 the kernel crashes the process when, with channels last, the gradients of only
    gamma and beta are needed.
    """

    def forward(x: Array, *_: Array | None) -> tuple[tuple[Array], tuple[()]]:
        return (x,), ()

    def backward(_: Any, upstream: tuple[Array, ...]) -> tuple[Array, None, None]:
        return upstream[0], None, None

    (x,) = custom_vjp(forward, backward, x, gamma, beta)
    return x


def _layout(z: Array) -> Any:
    """The memory format in which PyTorch's kernels take (N, C, ...) with the channels last."""
    import torch

    return {4: torch.channels_last, 5: torch.channels_last_3d}.get(z.ndim, torch.contiguous_format)
