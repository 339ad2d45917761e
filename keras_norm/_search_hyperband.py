"""Hyperband in front of KerasTuner's: trials that fail have ended too, as the worst of their round.

KerasTuner's oracle lets the best of a round go on once more have completed than are thrown out, so
each that failed takes the place of one that would have gone on. And it notes the bracket that was
begun last, which with several workers need not be that of a trial that goes on.

Reference: Li et al., 2018, Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["Hyperband"]


class Hyperband:
    """Goes in front of `keras_tuner.oracles.HyperbandOracle`, and says what it proposes next."""

    settings: Any
    exhausted: str

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Values of the trial that is to be made, for KerasTuner's `create_trial`."""
        oracle: Any = self
        oracle._remove_completed_brackets()
        for bracket in oracle._brackets:
            if len(bracket["rounds"][0]) < oracle._get_size(bracket["bracket_num"], 0):
                return dict(oracle._random_trial(trial_id, bracket))
            if values := self._onward(trial_id, bracket):
                return {"status": "RUNNING", "values": values}
        if oracle._current_bracket > 0:  # of one iteration, in which they count down
            oracle._increment_bracket_num()
            oracle._start_new_bracket()
            return dict(oracle._random_trial(trial_id, oracle._brackets[-1]))
        if not oracle.ongoing_trials and len(oracle.trials) < self.settings.planned:
            self.exhausted = "in some rounds more have failed than were to be left behind"
        return {"status": "IDLE" if oracle.ongoing_trials else "STOPPED"}

    def _onward(self, trial_id: str, bracket: Mapping[str, Any]) -> dict[str, Any] | None:
        """Values of a trial that goes on from one of the round before, if one may by now.

        It is the best of those that have completed, and goes on when whatever is still to come of
        its round, were it better, would leave it a place.
        """
        oracle: Any = self
        bracket_num, rounds = bracket["bracket_num"], bracket["rounds"]
        coming = 0  # trials that the round before may still get
        for number in range(1, len(rounds)):
            taken = {info["past_id"] for info in rounds[number]}
            left = [oracle.trials[i["id"]] for i in rounds[number - 1] if i["id"] not in taken]
            completed = [t for t in left if t.status == "COMPLETED"]
            undecided = coming + sum(t.status == "RUNNING" for t in left)
            places = oracle._get_size(bracket_num, number) - len(rounds[number])
            if completed and places > undecided:
                sign = 1 if oracle.objective.direction == "max" else -1
                best = max(completed, key=lambda t: sign * t.score)
                rounds[number].append({"past_id": best.trial_id, "id": trial_id})
                return {
                    **best.hyperparameters.values,
                    "tuner/trial_id": best.trial_id,
                    "tuner/epochs": oracle._get_epochs(bracket_num, number),
                    "tuner/initial_epoch": oracle._get_epochs(bracket_num, number - 1),
                    "tuner/bracket": bracket_num,
                    "tuner/round": number,
                }
            coming = min(places, len(completed) + undecided)
        return None
