"""The one manner of all scripts: options that default to make's variables, and how a program ends.

    @cli.main
    def main() -> int | None:
        options = cli.options(__doc__, "MODEL", "METHOD").read()
        ...

Nothing heavy is imported here: a mistyped name is refused before torch and transformers are, which takes seconds.
"""

import argparse
import atexit
import contextlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

from rmipo.errors import ConfigError, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended
NOISY = r"(torch\.distributed|transformers|accelerate|deepspeed|trl|peft)(\.|$)"
# make's variables, each an option of the scripts that take it: MODEL=tiny and --model tiny are the same.
VARIABLES = {
    "MODEL": "setting: a folder in recipes/",
    "STAGE": "sft, rmipo or all (default: all)",
    "METHOD": "file in recipes/methods/ or recipes/ablations/ (default: rmipo)",
    "DATA": "preference pairs to use in place of the recipe's: hub id, folder or file",
    "ARGS": 'overrides of the last recipe that runs, in one text: "--learning_rate 1e-6 --overlay FILE"',
    "GPUS": "GPUs of each machine, with the GB of one where they are elsewhere: 4 or 8x80 (default: all that are visible)",
    "NODES": "machines (default: 1)",
    "SHARDING": "file in configs/accelerate/ (default: zero3; ddp for LoRA)",
    "SLURM": "1 queues the stages with sbatch",
    "DRY": "1 prints what would run and starts nothing",
    "METHODS": "several methods, with commas or spaces between them",
    "SEEDS": "each orders the pairs its own way, and on tiny draws its own: 0,1,2",
    "NOISE": "shares of the training pairs whose labels are swapped: 0,0.15",
    "WORKERS": "programs at a time (default: one for each CPU core; on a GPU, one)",
    "EXAMPLES": "rows of the training data, where they are neither here nor a recipe's",
    "TFLOPS": "bfloat16 peak of one GPU (default: an A100's 312)",
    "BENCH": "one benchmark, or all",
    "MAX_COST": "US dollars that a judge may cost",
    "TASKS": "of the leaderboard: ifeval,bbh,math,gpqa,musr,mmlu_pro,gsm8k,mmlu (default: the first six)",
    "EVAL_NAME": "of an evaluation with other settings, kept beside the usual one",
    "SETTINGS": "eval.yaml in place of the setting's own",
    "N": "number of the table or figure",
    "METRIC": "what a figure shows",
    "TABLE": "number of the table",
    "PROMPTS": "prompts in place of those of pairs.yaml: hub id, folder or file",
    "OUTPUT": "folder of the pairs (default: outputs/<model>/pairs)",
    "PAIRS": "how many pairs to show (default: 200)",
    "AFTER": "second model: the page also shows how the pairs moved",
    "ROUNDS": "of sampling and training (default: 3)",
}


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help; a mistake is a UserError like any other; `~/` is expanded."""

    def __init__(self, doc: str):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def parse_known_args(self, args=None, namespace=None):
        arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args([at_home(argument) for argument in arguments], namespace)

    def read(self) -> argparse.Namespace:
        """The options of the command line; those in ARGS where the script has no other use for ARGS."""
        more = [] if "--args" in self._option_string_actions else split(os.environ.get("ARGS", ""))
        return self.parse_args([*more, *sys.argv[1:]])

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows the options")


def at_home(argument: str) -> str:
    """`~/x` and `--key=~/x` with the user's home, which a shell puts there only where no quotes are around it."""
    key, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
    return key + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def split(text: str) -> list[str]:
    """The words of ARGS, as a shell would read them, with `~/` expanded. Raises ConfigError."""
    try:
        return [at_home(word) for word in shlex.split(text)]
    except ValueError as error:
        raise ConfigError(f"ARGS={text!r} can't be read: {error}") from error


def options(doc: str, *variables: str, **meanings: str) -> Parser:
    """A parser with an option for each of make's `variables`; what is not given is read from the environment.

    `meanings`: what a variable means to this script, where that is something else than in VARIABLES.
    """
    parser = Parser(doc)
    for name in variables:
        help = f"{(VARIABLES | meanings)[name]} [{name}]"
        parser.add_argument(f"--{name.lower()}", metavar=name, default=at_home(os.environ.get(name, "")), help=help)
    return parser


def variables(options: argparse.Namespace) -> dict[str, str]:
    """The parsed `options` under the names of make's variables."""
    return {name: value for name in VARIABLES if (value := getattr(options, name.lower(), ""))}


def environment(script: str, doc: str, *names: str, **meanings: str) -> dict[str, str]:
    """The environment with make's variables as the command line gives them. The repository becomes the working directory."""
    os.chdir(Path(script).parent.parent)
    return os.environ | variables(options(doc, *names, **meanings).read())


def choose(variable: str, value: str, known: list[str], title: str) -> str:
    """`value` if it is one of `known`, else ConfigError with all of them."""
    if value in known:
        return value
    found = f"{variable}={value!r} is unknown" if value else f"{variable} is not set"
    raise ConfigError("\n  ".join([f"{found}. {title}:", *known]))


@contextlib.contextmanager
def program() -> Iterator[None]:
    """Around a script's `main`: a UserError ends it with its message and exit code 2; libraries are kept quiet."""
    # Deprecations inside and between libraries whose versions are pinned: nothing that a user could act on.
    warnings.filterwarnings("ignore", ".*deprecated", FutureWarning, NOISY)
    # Accumulation is ours (see `PreferenceTrainer.training_step`) or TRL's, and DeepSpeed is told so.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # Imported without a GPU, DeepSpeed warns that it found none, also where nothing is to run on one.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    code = 0
    try:
        yield
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        print(f"error{'' if rank == '0' else f' on rank {rank}'}: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # its reader has seen enough, such as `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except SystemExit as end:
        # A library called sys.exit with a message: Python prints it.
        if not isinstance(end.code, int | None):
            raise
        code = end.code or 0
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        _leave_the_others(code)
    if code:
        sys.exit(code)


def _leave_the_others(code: int) -> None:
    """End one of several processes.

    `destroy_process_group` closes the groups, but their threads (gloo's loops, the store's) end only with the last
    reference, and DeepSpeed and accelerate keep references. While the interpreter is taken down, such a thread can
    abort the process, although all of its work is done and saved. So the interpreter's own cleanup is done here, in
    order, and the process is left without taking the interpreter down, as `multiprocessing` leaves its children.
    """
    import torch

    if code == 0:
        torch.distributed.destroy_process_group()  # after an error another process may be gone, and this would wait
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a script's `main` and exit with the code that it returns."""
    with program():
        sys.exit(main())
    sys.exit(0)


def main(function: Callable[[], int | None]) -> None:
    """Decorates a script's `main`, its last definition: runs it where the script is the program, and not an import."""
    if function.__module__ == "__main__":
        run(function)
