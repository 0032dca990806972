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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from rmipo.errors import ConfigError, UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # as a shell reports a program that Ctrl-C ended


class Parser(argparse.ArgumentParser):
    """Shows a script's docstring as its help; a mistake is a UserError like any other."""

    def read(self) -> argparse.Namespace:
        """The options of the command line; those in ARGS where the script has no other use for ARGS."""
        more = [] if "--args" in self._option_string_actions else split(os.environ.get("ARGS", ""))
        return self.parse_args([*more, *sys.argv[1:]])

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. `{self.prog} --help` shows the options")


def split(text: str) -> list[str]:
    """The words of ARGS, as a shell would read them. Raises ConfigError."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"ARGS={text!r} can't be read: {error}") from error


def options(doc: str, *variables: str, **meanings: str) -> Parser:
    """A parser with an option for each of make's `variables`: MODEL=tiny and --model tiny are the same.

    `meanings`: what a variable means to this script, where `doc` doesn't say it.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name in variables:
        help = f"{meanings.get(name, 'the make variable')} [{name}]"
        parser.add_argument(f"--{name.lower()}", metavar=name, default=os.environ.get(name, ""), help=help)
    return parser


def variables(options: argparse.Namespace) -> dict[str, str]:
    """The parsed `options` that are set, under the names of make's variables."""
    return {name.upper(): value for name, value in vars(options).items() if value and isinstance(value, str)}


def environment(script: str, doc: str, *names: str, **meanings: str) -> dict[str, str]:
    """The environment with make's variables as the command line gives them. The repository becomes the working directory."""
    os.chdir(Path(script).parent.parent)
    return os.environ | variables(options(doc, *names, **meanings).read())


def is_on(env: Mapping[str, str], name: str) -> bool:
    """Whether a switch such as DRY is set: to anything but 0."""
    return env.get(name, "0") not in ("", "0")


def choose(variable: str, value: str, known: list[str], title: str) -> str:
    """`value` if it is one of `known`, else ConfigError with all of them."""
    if value in known:
        return value
    found = f"{variable}={value!r} is unknown" if value else f"{variable} is not set"
    raise ConfigError("\n  ".join([f"{found}. {title}:", *known]))


@contextlib.contextmanager
def program() -> Iterator[None]:
    """Around a script's `main`: a UserError ends it with its message and exit code 2, Ctrl-C without a traceback."""
    # Deprecations between libraries whose versions are pinned: nothing that a user could act on.
    warnings.filterwarnings("ignore", ".*deprecated", FutureWarning)
    # Accumulation is ours (see `PreferenceTrainer.training_step`) or TRL's, and DeepSpeed is told so.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # Imported without a GPU, DeepSpeed warns that it found none, also where nothing is to run on one.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    code = 0
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except SystemExit as end:
        code = end.code or 0
    if (distributed := sys.modules.get("torch.distributed")) and distributed.is_initialized():
        _leave_the_others(code)
    if code:
        sys.exit(code)


def _leave_the_others(code: int) -> None:
    """End one of several processes without taking the interpreter down, as `multiprocessing` ends its children.

    DeepSpeed and accelerate keep process groups' threads alive, which can abort a process whose work is done and saved.
    """
    if code == 0:
        sys.modules["torch.distributed"].destroy_process_group()  # after an error this would wait for one that is gone
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(function: Callable[[], int | None]) -> None:
    """Decorates a script's `main`, its last definition: runs it where the script is the program, and not an import."""
    if function.__module__ == "__main__":
        with program():
            sys.exit(function())
