"""Proposals of a Bayesian search: a Gaussian process over the trials, evaluated at many points.

This is KerasTuner's oracle, evaluated in another way. A proposal depends only on the trials, the
seed and its number. What differs:

    scores are taken as noisy, and a pruned trial counts by the score it might have reached;
    different kinds are equally far from one another, whatever their order in a list;
    the confidence bound is compared at many points at once, anywhere and around the best trials
    (its gradient by finite differences, from 50 points, is a staircase and takes minutes);
    proposals that nearly repeat a trial, or would likely fail or be refused, are skipped.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Bayesian", "Cube", "curve"]

Array = npt.NDArray[Any]

_ANYWHERE, _NEARBY, _BEST = 500, 200, 5  # points; points around each of so many of the best
_MOVED = 2  # hyperparameters in which a point nearby differs, on average
_STEP = 0.2  # part of its range by which a number moves
_ALIKE = 0.1  # part of its range, at most, by which a number must differ to make another trial
_CHOICES = 10  # most promising points to try before the proposal is a random one
_LEAST = 3  # scores needed before a process is fitted to them; trials that failed have none


class Bayesian:
    """A mixin in front of KerasTuner's Bayesian oracle and of the one that makes it durable."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """The next proposal, in KerasTuner's form."""
        oracle: Any = self
        done = [t for t in oracle.trials.values() if t.status == "COMPLETED"]
        ended = len(done) + sum(t.status == "FAILED" for t in oracle.trials.values())
        if ended >= oracle.num_initial_points and len(done) >= _LEAST:
            for values in self._promising(int(trial_id), done):
                if not oracle._duplicate(values) and oracle.admitted(values):
                    return {"status": "RUNNING", "values": values}
        return dict(oracle._random_populate_space())

    def _promising(self, number: int, done: list[Any]) -> list[dict[str, Any]]:
        """The points at which a lower confidence bound of the loss is lowest."""
        oracle: Any = self
        cube = Cube(oracle.hyperparameters.space)
        sign = -1.0 if oracle.objective.direction == "max" else 1.0
        loss = sign * self._prospects(done)
        trials = cube.points([_values(t) for t in done])
        going = [_values(t) for t in oracle.ongoing_trials.values()]
        tried = cube.points([*map(_values, oracle.trials.values()), *oracle.refused])

        rng = np.random.default_rng([oracle.settings.seed, 1, number])
        near = cube.around(trials[np.argsort(loss, kind="stable")[:_BEST]], _NEARBY, rng)
        points = cube.snapped(np.vstack([rng.uniform(size=(_ANYWHERE, cube.size)), near]))
        points = self._likely_to_succeed(cube, points[~cube.alike(points, tried)])
        if not len(points):
            return []
        process = _fitted(cube.features(trials), loss)
        if going:  # with a pessimistic guess, after the process has seen the others
            x = cube.features(cube.points(going))
            mean, deviation = process.predict(x, return_std=True)
            x = np.vstack([cube.features(trials), x])
            process = _fitted(x, np.concatenate([loss, mean + deviation]))
        mean, deviation = process.predict(cube.features(points), return_std=True)
        lowest = np.argsort(mean - oracle.beta * deviation, kind="stable")[:_CHOICES]
        return [cube.values(point) for point in points[lowest]]

    def _prospects(self, done: list[Any]) -> Array:
        """The scores; for a pruned trial the one it might have reached, not the one it had.

        It is better by the median improvement of the others from the same epoch on. A score after
        one epoch among scores after all epochs would teach that anything pruned is hopeless.
        """
        oracle: Any = self
        name = oracle.objective.name
        best = max if oracle.objective.direction == "max" else min
        is_last = oracle.settings.scoring == "last"
        curves = {t.trial_id: curve(t, name) for t in done}
        whole = [t for t in done if not t.message]
        scores = []
        for trial in done:
            gains = [0.0]
            if trial.message and whole:
                last = max(curves[trial.trial_id])
                before = [
                    [v for e, v in sorted(curves[t.trial_id].items()) if e <= last] for t in whole
                ]
                then = [values[-1] if is_last else best(values) for values in before]
                gains = [t.score - value for t, value in zip(whole, then, strict=True)]
            scores.append(trial.score + statistics.median(gains))
        return np.array(scores)

    def _likely_to_succeed(self, cube: Cube, points: Array) -> Array:
        """The points without those that would likely fail or be refused by the budget.

        The most promising nets are often the largest ones with the largest learning rate: close to
        those that are refused or diverge. A failed trial has no score, so the process does not see
        it; giving it a low score would make its good neighbours look bad.
        """
        oracle: Any = self
        trials = list(oracle.trials.values())
        lost = [*oracle.refused, *(_values(t) for t in trials if t.status == "FAILED")]
        if not lost or not len(points):
            return points
        from sklearn.ensemble import RandomForestClassifier

        known = [*lost, *(_values(t) for t in trials if t.status != "FAILED")]
        is_fine = np.arange(len(known)) >= len(lost)
        forest = RandomForestClassifier(50, random_state=0).fit(cube.points(known), is_fine)
        inside = forest.predict(points)
        return points[inside] if inside.any() else points


class Cube:
    """A space of KerasTuner's hyperparameters as a unit cube, for many points at a time.

    Each hyperparameter that is not fixed is an axis. On the axes of hyperparameters that a point
    does not have, because their conditions are not met, it is at the default.
    """

    def __init__(self, space: Sequence[Any]) -> None:
        self.space = list(space)
        self.axes = [hp for hp in self.space if type(hp).__name__ != "Fixed"]
        self.size = len(self.axes)
        self.is_choice = np.array([type(hp).__name__ in ("Choice", "Boolean") for hp in self.axes])
        self.is_kind = self.is_choice & [not getattr(hp, "ordered", False) for hp in self.axes]

    def points(self, values: Sequence[Mapping[str, Any]]) -> Array:
        """The points that stand for values, (N, axes)."""
        rows = [[hp.value_to_prob(v.get(hp.name, hp.default)) for hp in self.axes] for v in values]
        return np.array(rows, dtype=float).reshape(len(rows), self.size)

    def snapped(self, points: Array) -> Array:
        """The points moved to the middle of the value that each coordinate stands for."""
        columns, is_there = self._columns(points)
        places = [
            [hp.value_to_prob(v if there else hp.default) for v, there in zip(c, t, strict=True)]
            for hp, c, t in zip(self.axes, columns, is_there.T, strict=True)
        ]
        return np.array(places).T.reshape(points.shape)

    def values(self, point: Array) -> dict[str, Any]:
        """Hyperparameter -> value at a point, for those that it has."""
        found: dict[str, Any] = {}
        coordinates = iter(point)
        for hp in self.space:
            is_axis = type(hp).__name__ != "Fixed"
            value = hp.prob_to_value(next(coordinates)) if is_axis else hp.value
            if all(c.name in found and found[c.name] in c.values for c in hp.conditions):
                found[hp.name] = value.item() if isinstance(value, np.generic) else value
        return found

    def around(self, centres: Array, count: int, rng: np.random.Generator) -> Array:
        """Points that differ from a centre in a few of the hyperparameters that it has."""
        is_there = np.repeat(self._columns(centres)[1], count, axis=0)
        points = np.repeat(centres, count, axis=0)
        anywhere = rng.uniform(size=points.shape)
        moved = rng.random(points.shape) < _MOVED / is_there.sum(axis=1, keepdims=True)
        moved[np.arange(len(points)), np.argmax(is_there * anywhere, axis=1)] = True  # at least one
        step = np.clip(points + _STEP * rng.normal(size=points.shape), 0, 1)
        elsewhere = np.where(self.is_kind, rng.uniform(size=points.shape), step)
        return np.where(is_there, np.where(moved, elsewhere, points), anywhere)

    def alike(self, points: Array, others: Array) -> Array:
        """Whether a point hardly differs from one of the others, (N,)."""
        if not len(others):
            return np.zeros(len(points), dtype=bool)
        apart = np.abs(points[:, None] - others[None])  # (N, M, axes)
        spacing = len(others) ** (-1 / self.size)  # of that many evenly spread points
        least = np.where(self.is_choice, 1e-9, min(_ALIKE, 0.3 * spacing))
        return np.asarray((apart <= least).all(axis=2).any(axis=1))

    def features(self, points: Array) -> Array:
        """Coordinates for distances: any two different kinds are 1 apart."""
        columns, is_there = self._columns(points)
        found = []
        for j, hp in enumerate(self.axes):
            if self.is_kind[j]:
                same = [[v == kind for v in columns[j]] for kind in hp.values]
                found += list(np.array(same) * is_there[:, j] / np.sqrt(2))
            else:
                found.append(points[:, j])
        return np.array(found).T

    def _columns(self, points: Array) -> tuple[list[list[Any]], Array]:
        """Values on each axis, and whether the points have that hyperparameter, (N, axes)."""
        count = len(points)
        known: dict[str, tuple[list[Any], Array]] = {}
        columns, is_there = [], []
        coordinates = iter(points.T)
        for hp in self.space:
            is_axis = type(hp).__name__ != "Fixed"
            column = [hp.prob_to_value(p) for p in next(coordinates)] if is_axis else None
            values = [hp.value] * count if column is None else column
            there = np.ones(count, dtype=bool)
            for condition in hp.conditions:
                theirs, had = known.get(condition.name, ([None] * count, np.zeros(count, bool)))
                there = there & had & np.array([v in condition.values for v in theirs], dtype=bool)
            if is_axis:
                columns.append(values)
                is_there.append(there)
            if hp.name in known:  # one name may occur under several conditions
                earlier, had = known[hp.name]
                values = [a if h else b for a, b, h in zip(earlier, values, had, strict=True)]
                known[hp.name] = values, had | there
            else:
                known[hp.name] = values, there
        return columns, np.array(is_there).T.reshape(count, self.size)


def curve(trial: Any, metric: str) -> dict[int, float]:
    """Epoch -> value."""
    if not trial.metrics.exists(metric):
        return {}
    return {int(o.step): float(o.mean()) for o in trial.metrics.get_history(metric)}


def _values(trial: Any) -> dict[str, Any]:
    return dict(trial.hyperparameters.values)


def _fitted(x: Array, y: Array) -> Any:
    """A Gaussian process of scores with noise."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import Matern, WhiteKernel

    kernel = Matern(1.0, (0.1, 10.0), nu=2.5) + WhiteKernel(0.1, (1e-4, 1.0))
    process = GaussianProcessRegressor(
        kernel, normalize_y=True, n_restarts_optimizer=3, random_state=0
    )
    with warnings.catch_warnings():  # a scale at its bound, as when scores are mere noise
        warnings.simplefilter("ignore", ConvergenceWarning)
        return process.fit(x, y)
