"""Normalizations beyond mean and variance: whitening, quantiles, filter responses.

The same lines run on TensorFlow (eagerly, in graphs, under XLA), JAX and PyTorch. Each
normalization is a pure function with its hand-derived gradient, and a Keras layer around it.

Whitening, or decorrelated batch normalization, treats the S channels of a group g together. With
x a vector of S channels, for each of the positions i with weights w >= 0, W = sum w:

    (W1)  mean       = sum w x / W
    (W2)  covariance = sum w (x - mean)(x - mean)^T / W
    (W3)  A          = (1 - shrinkage) covariance + (shrinkage / S) trace I + epsilon I
    (W4)  U with U A U^T = I:  A^(-1/2) ("zca"),  L^-1 of A = L L^T ("cholesky"),  or, of
          P_0 = I, P_(k+1) = (3 P_k - P_k^3 A / trace A) / 2, the last P / sqrt(trace A) ("newton")
    (W5)  x_hat      = U (x - mean)
    (W6)  y          = gamma x_hat + beta

and backward, with dmean and dcovariance the gradients with respect to the statistics:

    (W7)  dbeta  = sum dy,   K = sum dy (x - mean)^T,   dgamma_s = sum over t of U_st K_st
    (W8)  dU     = diag(gamma) K
    (W9)  dA, "zca":       -U^2 Z U^2, where U Z + Z U = (dU + dU^T) / 2
              "cholesky":  -U^T lower(dU U^T) U, with half of the diagonal
              "newton":    the steps of (W4) backward, the last one first
    (W10) B      = (1 - shrinkage) dA + (shrinkage / S) trace(dA) I + dcovariance
    (W11) a      = dmean - U^T diag(gamma) dbeta
    (W12) dx     = U^T diag(gamma) dy + (w / W) (a + (B + B^T) (x - mean))

In the eigenbasis of A, with eigenvalues l, Z_st is dU_st / (l_s^(-1/2) + l_t^(-1/2)): nothing is
divided by a difference of eigenvalues, so that equal ones need no care. (W12) has the form of
(B10) of `keras_norm.functional`, which it is for S = 1.

Quantile normalization sends each channel through its own distribution function F, and the
inverse G^-1 of that of the target. With K quantiles at the levels p_k = (k + 1/2) / K, r the rank
(from 0) of an element among the N of its channel, and hat(t) = max(0, 1 - |t|):

    (Q1)  q_k    = sum x hat(r - (p_k N - 1/2))         (between the two nearest elements)
    (Q2)  z_k    = G^-1(p_k),   d_k = z_(k+1) - z_k
    (Q3)  h_k    = q_(k+1) - q_k + epsilon (z_(K-1) - z_0)
    (Q4)  t_k    = (x - (q_k + q_(k+1)) / 2) / h_k + 1/2
    (Q5)  x_hat  = z_0 + sum over k of d_k clip(t_k)
    (Q6)  y      = gamma x_hat + beta

The clip is to [0, 1], but for the outermost two, which go on as straight lines to the end of the
target's range. Backward, g_k = gamma dy d_k / h_k where t_k is not clipped, else 0:

    (Q7)  dq_k   gets -sum g_k / 2 + sum g_k (t_k - 1/2),
          dq_(k+1)    -sum g_k / 2 - sum g_k (t_k - 1/2)
    (Q8)  dx     = sum over k of g_k + dq_k hat(r - (p_k N - 1/2))

Filter response normalization, per example and channel, over its P positions:

    (F1)  mean_square = sum x^2 / P
    (F2)  inv         = 1 / sqrt(mean_square + epsilon + |learned_epsilon|)
    (F3)  y           = gamma x inv + beta
    (F4)  z           = max(y, tau)

    (F5)  dy      = dz where y > tau, else 0;   dtau = sum of the other dz
    (F6)  dbeta   = sum dy,   dgamma = sum dy x inv,   s = sum over positions of gamma dy x
    (F7)  dx      = inv gamma dy - x inv^3 s / P
    (F8)  dlearned_epsilon = -sign(learned_epsilon) sum over examples of inv^3 s / 2

Reference: Huang, Yang, Lang and Deng, 2018, Decorrelated Batch Normalization. Huang, Zhou, Zhu,
Liu and Shao, 2019, Iterative Normalization. Ledoit and Wolf, 2004, A well-conditioned estimator
for large-dimensional covariance matrices (shrinkage). Singh and Krishnan, 2020, Filter Response
Normalization Layer. The gradients are derived here.
"""

from keras import ops  # noqa: F401 (in the examples of the layers)

from keras_norm._decorrelation import (
    DecorrelatedBatchNormalization,
    decorrelated_batch_normalization,
    whiten,
    whitening_matrix,
)
from keras_norm._quantiles import (
    QuantileNormalization,
    quantile_normalization,
    quantile_normalize,
)
from keras_norm._response import FilterResponseNormalization, filter_response_normalization

__all__ = [
    "DecorrelatedBatchNormalization",
    "FilterResponseNormalization",
    "QuantileNormalization",
    "decorrelated_batch_normalization",
    "filter_response_normalization",
    "quantile_normalization",
    "quantile_normalize",
    "whiten",
    "whitening_matrix",
]

# They are saved, and shown, as parts of this module.
for _layer in (
    DecorrelatedBatchNormalization,
    QuantileNormalization,
    FilterResponseNormalization,
):
    _layer.__module__ = __name__
