"""The test of a difference between two settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """The test of a difference between two settings, a − b.

    Where all seeds differ by the same, and not by 0, there is no spread to hold the difference
    against, and no t-test (`untested` says so): `low`, `high`, `p`, `p_adjusted` and `effect_size`
    are NaN, which is neither above nor below any level. Accuracies are multiples of 1 / N, and with
    two seeds this is common.

    Args:
        a: Name of the first setting.
        b: Name of the second.
        metric: The metric compared.
        paired: Whether the differences were taken per seed.
        n: Number of pairs, or of values of the smaller sample.
        difference: Mean of a − mean of b.
        low: Lower end of the 95% confidence interval of the difference.
        high: Its upper end.
        p: Two-sided p of the t-test (paired, or Welch's).
        p_rank: Two-sided p of Wilcoxon's signed-rank test, or of Mann and Whitney's.
        effect_size: Cohen's d_z of paired, Cohen's d of independent samples.
        p_adjusted: p adjusted for the number of tests (`Results.compare_pairs`), or None.

    Example:
        >>> from keras_norm.experiments import Results, Run
        >>> runs = [Run(n, {"n": n}, s, final={"accuracy": a + s / 10})
        ...         for n, a in (("a", 0.504), ("b", 0.5)) for s in range(2)]
        >>> Results(runs).compare("a", "b", "accuracy").in_points()
        '+0.4 points (not tested: all seeds differ alike)'
    """

    a: str
    b: str
    metric: str
    paired: bool
    n: int
    difference: float
    low: float
    high: float
    p: float
    p_rank: float
    effect_size: float
    p_adjusted: float | None = None

    @property
    def untested(self) -> str:
        """Why there is no t-test, as it reads in a sentence; "" where there is one."""
        if not math.isnan(self.p):
            return ""
        return f"not tested: {'all seeds differ alike' if self.paired else 'no seed differs'}"

    def in_points(self) -> str:
        """The difference of two fractions in percentage points, as it reads in a sentence.

        Example:
            >>> from keras_norm.experiments import Comparison
            >>> Comparison("a", "b", "accuracy", True, 5, 0.012, 0.004, 0.02, 0.01, 0.06, 1.9, 0.03
            ...     ).in_points()
            '+1.2 points (95 % +0.4 to +2.0; p by Holm 0.03)'
        """
        if self.untested:
            return f"{100 * self.difference:+.1f} points ({self.untested})"
        p = f"p = {self.p:.2g}" if self.p_adjusted is None else f"p by Holm {self.p_adjusted:.2g}"
        return (
            f"{100 * self.difference:+.1f} points (95 % {100 * self.low:+.1f} to "
            f"{100 * self.high:+.1f}; {p})"
        )

    def __str__(self) -> str:
        t_test, rank_test, size = (
            ("paired t-test", "Wilcoxon", "d_z")
            if self.paired
            else ("Welch's t-test", "Mann–Whitney", "d")
        )
        floor = 2.0 ** (1 - self.n)
        note = f", at best {floor:.2g} with {self.n} pairs" if self.paired and floor > 0.05 else ""
        start = f"{self.metric} of {self.a!r} minus {self.b!r}: {self.difference:+.4f} ("
        rank, n = (
            f"{rank_test} p = {self.p_rank:.2g}{note}",
            f"n = {self.n}{' pairs' * self.paired}",
        )
        if self.untested:
            return f"{start}{rank}; {n}); by a t-test {self.untested}."
        verdict = "is" if self.p < 0.05 else "is not"
        return (
            f"{start}95% confidence interval {self.low:+.4f} to {self.high:+.4f}; "
            f"{t_test} p = {self.p:.2g}, {rank}; "
            f"Cohen's {size} = {self.effect_size:.2f}; {n}): "
            f"the difference {verdict} significant at the 5% level."
        )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number, by Holm's method.

    Of twenty true null hypotheses one is expected to fall at the 5% level. Whoever claims
    all differences whose adjusted p is at most 0.05 makes any false claim in at most 5% of studies,
    whatever the tests have to do with each other.

    With the p-values in increasing order p_1 <= ... <= p_m:

        adjusted p_k = max over j <= k of min(1, (m - j + 1) p_j)

    Args:
        p_values: Each in [0, 1]; or NaN for a test that could not be made, which counts in m.

    Returns:
        The adjusted ones, in the order of `p_values`; NaN stays NaN.

    Raises:
        ValueError: A value outside of [0, 1].

    Example:
        >>> from keras_norm.experiments import holm
        >>> holm([0.03, 0.01, 0.5])
        [0.06, 0.03, 0.5]

    Reference: Holm, 1979, A Simple Sequentially Rejective Multiple Test Procedure.
    """
    p = [float(value) for value in p_values]
    made = [index for index, value in enumerate(p) if not math.isnan(value)]
    if not all(0 <= p[index] <= 1 for index in made):
        raise ValueError(f"p-values lie in [0, 1]. Received: p_values={p}.")
    adjusted, largest = [math.nan] * len(p), 0.0
    for rank, index in enumerate(sorted(made, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = largest
    return adjusted


def paired_test(a: Floats, b: Floats) -> dict[str, Any]:
    from scipy import stats

    differences = a - b
    n, mean = len(differences), float(differences.mean())
    spread = _rounded(differences.std(ddof=1), a, b)
    mean = mean if spread else _rounded(mean, a, b)
    sizes = _with_ties(np.abs(differences), _resolution(a, b))
    ranked = (np.sign(differences) * sizes)[sizes > _resolution(a, b)]
    return {
        "n": n,
        "effect_size": _ratio(mean, spread),
        "p_rank": float(stats.wilcoxon(ranked).pvalue) if len(ranked) else 1.0,
        **_t_test(mean, spread / math.sqrt(n), n - 1),
    }


def independent_test(a: Floats, b: Floats) -> dict[str, Any]:
    from scipy import stats

    mean = float(a.mean() - b.mean())
    variances = [_rounded(x.std(ddof=1), a, b) ** 2 for x in (a, b)]
    errors = [v / len(x) for v, x in zip(variances, (a, b), strict=True)]  # of the means, squared
    mean = mean if sum(errors) else _rounded(mean, a, b)
    weights = sum(e**2 / (len(x) - 1) for e, x in zip(errors, (a, b), strict=True))
    degrees = sum(errors) ** 2 / weights if weights else len(a) + len(b) - 2.0
    pooled = sum(v * (len(x) - 1) for v, x in zip(variances, (a, b), strict=True))
    ranked = _with_ties(np.concatenate([a, b]), _resolution(a, b))
    p_rank = 1.0  # where all are equal; SciPy says NaN from 1.18 on
    if np.ptp(ranked):
        p_rank = float(stats.mannwhitneyu(*np.split(ranked, [len(a)])).pvalue)
    return {
        "n": min(len(a), len(b)),
        "effect_size": _ratio(mean, math.sqrt(pooled / (len(a) + len(b) - 2))),
        "p_rank": p_rank,
        **_t_test(mean, math.sqrt(sum(errors)), degrees),
    }


def _t_test(mean: float, standard_error: float, degrees: float) -> dict[str, float]:
    """Difference, its 95% confidence interval and two-sided p."""
    from scipy import stats

    ratio = _ratio(mean, standard_error)
    p = 2 * float(stats.t.sf(abs(ratio), degrees))
    margin = float(stats.t.ppf(0.975, degrees)) * standard_error if ratio == ratio else math.nan
    return {"difference": mean, "low": mean - margin, "high": mean + margin, "p": p}


def _resolution(a: Floats, b: Floats) -> float:
    """What differs by less is equal to a test of ranks: metrics come in float32."""
    return 1e-6 * float(np.abs([*a, *b]).max())


def _with_ties(values: Floats, resolution: float) -> Floats:
    """Each value, or the least of those that it is tied with: neighbours within `resolution`."""
    ordered = np.sort(values)
    first = ordered[np.diff(ordered, prepend=-np.inf) > resolution]  # of each tie
    return first[np.searchsorted(first, values, side="right") - 1]


def _rounding(a: Floats, b: Floats) -> float:
    return 1e-12 * float(np.abs([*a, *b]).max())


def _rounded(value: float, a: Floats, b: Floats) -> float:
    """What is rounding error alone counts as 0."""
    return float(value) if abs(value) > _rounding(a, b) else 0.0


def _ratio(mean: float, spread: float) -> float:
    """NaN where a mean has no spread to be held against."""
    if spread:
        return mean / spread
    return math.nan if mean else 0.0
