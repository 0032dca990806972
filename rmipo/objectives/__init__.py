"""The method and its rivals: every objective of the paper's Table 4, called on the scores of pairs.

`rmipo.py` comes first: the loss of the paper as pure functions. A new objective is one frozen dataclass in
`baselines.py`, listed in `OBJECTIVES`. Where print and published code of a method disagree, docs/METHODS.md says how, and
`fidelity` chooses between them where both are worth running.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import pydantic

from rmipo.objectives.base import PRIORS, Objective, ObjectiveOutput, PairScores
from rmipo.objectives.baselines import CPO, DPO, IPO, KTO, AlphaDPO, BetaDPO, EpsilonDPO, SimPER, SimPO, SLiC
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
    # The recipe's own is recorded as it was written.
    block = dict(block)
    name = block.pop("name", None)
    if not isinstance(name, str) or name not in OBJECTIVES:
        raise ValueError(f"objective.name is {name!r}: expected one of {', '.join(OBJECTIVES)}")
    cls, problems = OBJECTIVES[name], []
    # A misspelt key would leave the default in its place.
    keys = [field.name for field in fields(cls)]
    for key in sorted(block.keys() - set(keys)):
        problems.append(f"objective.{key} is not a key of {name}, which has {', '.join(keys) or 'none'}")
    try:
        objective = cls(**{key: value for key, value in block.items() if key in keys})
    except pydantic.ValidationError as error:
        for one in error.errors():
            # A check of several keys names them itself.
            named = f"{one['loc'][0]} is {one['input']!r}: " if one["loc"] else ""
            problems.append(f"objective.{named}{one['msg'].removeprefix('Value error, ')}")
    if problems:
        raise ValueError("\n  ".join([f"The recipe's objective block does not fit {name}:", *problems]))
    return objective
