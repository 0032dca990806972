"""One of two processes of test_training_run.py: it keeps a reference to a process group, as DeepSpeed does, and ends."""

import atexit
import os
import sys

import torch
from accelerate import PartialState

from rmipo.cli import program
from rmipo.errors import UserError


class Interpreter:
    """Deleted when the interpreter is taken down: what a thread that is still alive can't survive."""

    def __del__(self):
        os.write(1, b"the interpreter is taken down\n")


@program()
def main() -> None:
    PartialState(cpu=True)
    kept.append(torch.distributed.new_group())
    torch.distributed.all_reduce(torch.ones(1), group=kept[0])
    atexit.register(lambda: print(f"rank {os.environ['RANK']} ran its exit functions"))
    if "error" in sys.argv:
        raise UserError("as asked for")
    if "stop" in sys.argv:
        sys.exit(75)


kept: list = []
interpreter = Interpreter()
if __name__ == "__main__":
    main()
