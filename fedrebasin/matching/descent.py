"""A descent of weight matching: one permutation at a time, solved exactly, until no one gains."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch

from fedrebasin.assignment import best_assignment
from fedrebasin.matching.nested import families_over, nested_step
from fedrebasin.matching.plan import Block
from fedrebasin.matching.problem import WeightProblem
from fedrebasin.perms import Perms

#: A step must gain this share of |reference| |model|, the two norms over the block's tensors: below it is rounding.
TOLERANCE = 1e-7
_MAX_PASSES = 1000
#: Blocks that cost this many times as much as others wait for these.
_DEARER = 64.0
#: See ``out_of_reach``. Of 39 pairs (of 100 that were looked at) whose second start won none was given up, and of 46
#: sets of 3 to 10 models (of 112) two.
_HOPE = 1 / 8


class Descent:
    """Improves a block after the other, from where the problem stands.

    A block is looked at only after a neighbour has moved; at first too, unless it is among those at their ``best``.
    A dear block waits until no cheaper one has anything to gain: a ResNet's first stages settle before its last one,
    which ends higher (ResNet50: by 1%) after fewer large assignments.

    Parameters
    ----------
    problem : WeightProblem
    order : sequence of Block
        In which blocks are visited.
    objective : float
        Of the problem as it stands.
    best : collection of Block, optional
    """

    def __init__(
        self, problem: WeightProblem, order: Sequence[Block], objective: float, best: Collection[Block] = ()
    ) -> None:
        self._problem, self._order = problem, order
        self._waiting = set(problem.blocks).difference(best)
        self._tiers = tiers(problem)
        self._dearest = max(self._tiers.values(), default=0)
        self.history = [objective]
        self.perms = dict(problem.perms)

    @property
    def objective(self) -> float:
        """Where it is."""
        return self.history[-1]

    @property
    def ended(self) -> bool:
        """True once nothing gains."""
        return not self._waiting or len(self.history) > _MAX_PASSES

    def finish(self, hurdle: float = -math.inf) -> Descent:
        """Go on until nothing gains, or it seems out of reach to gain more than the ``hurdle``."""
        while not self.ended:
            before = self.objective
            self.turn()
            if out_of_reach(hurdle, self.objective, self.objective - before, self.history[0]):
                break
        return self

    def turn(self) -> Descent:
        """Go on until the dearest blocks have had a turn, or nothing gains."""
        dear = False
        while not (dear or self.ended):
            tier, gained = min(self._tiers[block] for block in self._waiting), 0.0
            for block in self._order:
                if block in self._waiting and self._tiers[block] == tier:
                    self._waiting.discard(block)
                    gain = improve(self._problem, block)
                    if gain > 0:
                        gained += gain
                        self._waiting.update(self._problem.plan.neighbours[block])
            if gained:
                self.history.append(self.objective + gained)
            dear = tier == self._dearest
        self.perms = dict(self._problem.perms)
        return self


def out_of_reach(hurdle: float, objective: float, gained: float, start: float) -> bool:
    """True once a descent's last turn does not let hope that it ends above the ``hurdle``.

    That is a share r of the hurdle's gain over the ``start`` away, and the turn gained a share g of it. Turns whose
    gains fall as c/k^2 add about sqrt(g c) from there on: it is given up where r^2 > g / 8.
    """
    gap = hurdle - objective
    return gap > 0 and gap**2 > _HOPE * gained * (hurdle - start)


def tiers(problem: WeightProblem) -> dict[Block, int]:
    """0 for blocks that cost less than ``_DEARER`` times the cheapest one, 1 for those up to its square, and so on."""
    costs = {block: cost(problem, block) for block in problem.blocks}
    least = min(costs.values(), default=1)
    return {block: int(math.log(cost / least, _DEARER)) for block, cost in costs.items()}


def cost(problem: WeightProblem, block: Block) -> int:
    """About what a look at a block costs: its products, and an assignment."""
    return block.size * (sum(problem.entries(block)) + 20 * block.size**2)


def improve(problem: WeightProblem, block: Block) -> float:
    """Move the block's units to where they gain most; returns the gain, 0 if nothing moved."""
    if families_over(problem, block.perm):
        return _move_if_better(problem, nested_step(problem, block), problem.scale(block))
    similarity = problem.similarity(block)
    current = torch.arange(block.size, device="cpu") if block in problem.plan.relative else problem.perms[block.perm]
    new = best_assignment(similarity, current)
    if new is current:
        return 0.0
    after, before = similarity.gather(1, torch.stack([new, current], 1)).sum(0, dtype=torch.float64).tolist()
    gain: float = after - before
    if gain <= TOLERANCE * problem.scale(block):
        return 0.0
    if block in problem.plan.quadratic:
        return _move_if_better(problem, problem.steps(block, new), problem.scale(block))
    if block in problem.plan.relative:
        problem.move(problem.steps(block, new))
    else:
        problem.put({block.perm: new}, [block.perm])
    return gain


def _move_if_better(problem: WeightProblem, steps: Perms, scale: float) -> float:
    """Move units by steps that are not sure to gain, and back again if they do not; returns the gain."""
    names = problem.names_of(steps)
    perms = {perm: problem.perms[perm] for perm in steps}
    before = problem.objective(names)
    problem.move(steps)
    gain = problem.objective(names) - before
    if gain > TOLERANCE * scale:
        return gain
    problem.put(perms, perms)
    return 0.0
