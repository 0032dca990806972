"""Everything that has to run before a table is complete: trainings, then evaluations, in order."""

from pathlib import Path
from typing import NamedTuple

from rmipo.evaluation import benchmark_of
from rmipo.reporting.results import eval_command, is_trained, load_result, sft_command, train_command
from rmipo.reporting.tables import Table


class Command(NamedTuple):
    text: str
    done: bool

    @property
    def is_training(self) -> bool:
        return self.text.startswith("make train")


def chain(table: Table, outputs: Path) -> list[Command]:
    """The commands behind a table, those that are done marked so: SFT first, then each run with its evaluations."""
    benches: dict[tuple[str, str], dict[str, None]] = {}  # (model, method) -> ordered set
    for cell in table.cells.itertuples():
        benches.setdefault((cell.model, cell.method), {})[benchmark_of(cell.metric).name] = None
    models = dict.fromkeys(model for model, _ in benches)
    commands = [Command(text, is_trained(outputs, model, "sft")) for model in models if (text := sft_command(model))]
    for (model, method), needed in benches.items():
        if method != "initial":
            commands.append(Command(train_command(model, method), is_trained(outputs, model, method)))
        for bench in needed:
            done = load_result(outputs, model, method, bench) is not None
            commands.append(Command(eval_command(model, method, bench), done))
    return commands


def summary(commands: list[Command]) -> str:
    """What is left to do, and how long the paper says a training takes."""
    left = [command for command in commands if not command.done]
    trainings = sum(command.is_training for command in left)
    return (
        f"{len(left)} of {len(commands)} steps left: {trainings} trainings, {len(left) - trainings} evaluations. By the "
        "paper's Figure 7 a training of an 8B model takes 6 to 10 hours on 4 A800"
    )
