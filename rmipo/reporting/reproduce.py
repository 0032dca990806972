"""Everything that has to run before a table is complete: trainings, then evaluations, in order."""

from dataclasses import dataclass
from pathlib import Path

from rmipo.reporting.results import eval_command, is_trained, load_result, sft_command, train_command
from rmipo.reporting.tables import Table


@dataclass(frozen=True)
class Step:
    """One command."""

    command: str
    done: bool

    @property
    def is_training(self) -> bool:
        return self.command.startswith("make train")


def chain(table: Table, outputs: Path) -> list[Step]:
    """The steps of a table, those that are done marked so: SFT first, then each run with its evaluations."""
    benches: dict[tuple[str, str], dict[str, None]] = {}  # (model, method) -> ordered set
    for cell in table.cells:
        benches.setdefault((cell.model, cell.method), {})[cell.bench] = None
    models = dict.fromkeys(model for model, _ in benches)
    sft = [(command, model) for model in models if (command := sft_command(model))]
    steps = [Step(command, is_trained(outputs, model, "sft")) for command, model in sft]
    for (model, method), needed in benches.items():
        if method != "initial":
            steps.append(Step(train_command(model, method), is_trained(outputs, model, method)))
        for bench in needed:
            done = load_result(outputs, model, method, bench) is not None
            steps.append(Step(eval_command(model, method, bench), done))
    return steps


def summary(steps: list[Step]) -> str:
    """What is left to do, and how long the paper says a training takes."""
    left = [step for step in steps if not step.done]
    trainings = sum(step.is_training for step in left)
    return (
        f"{len(left)} of {len(steps)} steps left: {trainings} trainings, {len(left) - trainings} evaluations. By the paper's "
        "Figure 7 a training of an 8B model takes 6 to 10 hours on 4 A800. `make plan` estimates yours"
    )
