"""Hyperband in front of KerasTuner's: trials that fail have ended too, as the worst of their round.

KerasTuner's oracle promotes the best of a round once more have completed than are dropped, so each
failed trial takes the place of one that would have been promoted. It notes the bracket that was
started last, which with several workers need not be that of a promoted trial. And if a space has
fewer values than a bracket needs, it ends with all of them at the shortest training; here the best
are promoted, in the same proportion.

Reference: Li et al., 2018, Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Hyperband"]


class Hyperband:
    """A mixin in front of `keras_tuner.oracles.HyperbandOracle`: decides what it proposes next."""

    settings: Any
    exhausted: str
    no_new_values = False  # none were found, and none are looked for again

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Values of the trial to be made, for KerasTuner's `create_trial`."""
        oracle: Any = self
        oracle._remove_completed_brackets()
        for bracket in oracle._brackets:
            if len(bracket["rounds"][0]) < oracle._get_size(bracket["bracket_num"], 0) and (
                proposal := self._new(trial_id, bracket)
            ):
                return proposal
            if values := self._onward(trial_id, bracket):
                return {"status": "RUNNING", "values": values}
        if oracle._current_bracket > 0 and not self.no_new_values:
            oracle._increment_bracket_num()  # within one iteration the numbers count down
            oracle._start_new_bracket()
            if proposal := self._new(trial_id, oracle._brackets[-1]):
                return proposal
        if oracle.ongoing_trials:
            return {"status": "IDLE"}
        if len(oracle.trials) < self.settings.planned and not self.no_new_values:
            self.exhausted = "in some rounds more have failed than were to be left behind"
        return {"status": "STOPPED"}

    def _new(self, trial_id: str, bracket: Mapping[str, Any]) -> dict[str, Any] | None:
        """A trial of the first round, with values that no other has."""
        oracle: Any = self
        if self.no_new_values:
            return None
        proposal = dict(oracle._random_trial(trial_id, bracket))
        self.no_new_values = proposal["status"] != "RUNNING"
        return None if self.no_new_values else proposal

    def _places(self, bracket: Mapping[str, Any], number: int) -> int:
        """How many trials a round may have; fewer in proportion if the first round found fewer."""
        oracle: Any = self
        whole, first = (oracle._get_size(bracket["bracket_num"], n) for n in (number, 0))
        return math.ceil(len(bracket["rounds"][0]) * whole / first)

    def _onward(self, trial_id: str, bracket: Mapping[str, Any]) -> dict[str, Any] | None:
        """Values of a trial that continues one of the round before, if one may be promoted by now.

        It is the best of those that have completed. It may be promoted if there is a place for it
        even if all trials still to come in its round are better.
        """
        oracle: Any = self
        bracket_num, rounds = bracket["bracket_num"], bracket["rounds"]
        coming = 0  # trials that the round before may still get
        for number in range(1, len(rounds)):
            taken = {info["past_id"] for info in rounds[number]}
            left = [oracle.trials[i["id"]] for i in rounds[number - 1] if i["id"] not in taken]
            completed = [t for t in left if t.status == "COMPLETED"]
            undecided = coming + sum(t.status == "RUNNING" for t in left)
            places = self._places(bracket, number) - len(rounds[number])
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
