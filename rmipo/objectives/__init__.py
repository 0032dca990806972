"""The method and its rivals: every objective of the paper's Table 4, called on the scores of pairs.

`rmipo.py` comes first: the loss of the paper as pure functions. A new objective is one frozen dataclass in the module of
its kind, listed in `OBJECTIVES`. Where print and published code of a method disagree, docs/METHODS.md says how, and
`fidelity` chooses between them where both are worth running.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from rmipo.objectives.adaptive import AlphaDPO, BetaDPO, EpsilonDPO
from rmipo.objectives.base import PRIORS, Objective, ObjectiveOutput, PairScores, explain
from rmipo.objectives.reference_based import DPO, IPO, KTO
from rmipo.objectives.reference_free import CPO, SimPER, SimPO, SLiC
from rmipo.objectives.rmipo import RMiPO

__all__ = ["OBJECTIVES", "PRIORS", "Objective", "ObjectiveOutput", "PairScores", "build_objective"]

OBJECTIVES: dict[str, type[Objective]] = {
    cls.name: cls for cls in (RMiPO, DPO, SLiC, IPO, CPO, KTO, SimPO, AlphaDPO, BetaDPO, EpsilonDPO, SimPER)
}


def build_objective(block: Mapping[str, Any]) -> Objective:
    """The objective of a recipe's `objective:` block.

    Raises:
        ValueError: one message with every unknown key, wrong type and value outside its domain.
    """
    if not isinstance(block, Mapping):
        raise ValueError(f"objective is {block!r}: expected a block, such as {{'name': 'simpo', 'gamma': 1.0}}")
    block = dict(block)
    name = block.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective.name is {name!r}: expected one of {', '.join(OBJECTIVES)}")
    cls = OBJECTIVES[name]
    defaults = {f.name: f.default for f in fields(cls)}
    problems = []
    for key in block.keys() - defaults.keys():
        near = difflib.get_close_matches(str(key), defaults, n=1)
        hint = cls.hints.get(key) or (f"did you mean {near[0]}?" if near else "")
        problems.append(f"objective.{key} is not a key of {name}" + (f": {hint}" if hint else ""))
    if problems := sorted(problems) + cls.problems(defaults | block):
        raise ValueError(explain(cls, problems))
    return cls(**block)
