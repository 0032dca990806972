"""What make's variables choose: settings, stages, methods, machines. Wrong choices are refused with the right ones listed.

Nothing heavy is imported: a refusal comes at once. Paths are relative to the repository's root, the working directory.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from rmipo.cli import Parser, choose, is_on, split
from rmipo.errors import ConfigError, EvaluationError
from rmipo.record import recorded_run

ROOT = Path(__file__).parents[2]
MADE_FIRST = ("world", "weights", "pairs")  # what a setting makes before its first training


def refuse(env: Mapping[str, str], *names: str) -> None:
    """Raises ConfigError if one of the variables `names` is set, which the command can't follow."""
    if given := [name for name in names if is_on(env, name)]:
        raise ConfigError(f"{', '.join(given)}: this command can't follow it; leave it out")


def choose_stages(env: Mapping[str, str]) -> tuple[str, list[str]]:
    """(setting, its stages in order) as MODEL and STAGE ask for them."""
    folders = {path.parent.name for name in ("sft", "rmipo") for path in Path("recipes").glob(f"*/{name}.yaml")}
    model = choose("MODEL", env.get("MODEL", ""), sorted(folders - {"sweeps"}), "The settings")
    present = [s for s in (*MADE_FIRST, "sft", "rmipo") if Path(f"recipes/{model}/{s}.yaml").is_file()]
    trained = [stage for stage in present if stage not in MADE_FIRST]
    stage = choose("STAGE", env.get("STAGE") or "all", [*trained, "all"], f"The stages of {model}")
    # What is made first is made whatever stage is asked for: its program keeps what is there.
    stages = present if stage == "all" else [name for name in present if name in (*MADE_FIRST, stage)]
    return model, stages + ["report"] * ("world" in present and "rmipo" in stages)


def choose_method(env: Mapping[str, str]) -> tuple[str, list[str]]:
    """(name, overlays) that METHOD stands for."""
    methods = named_files("recipes/methods") | named_files("recipes/ablations")
    name = choose("METHOD", env.get("METHOD") or "rmipo", ["rmipo", *methods], "The methods and ablations")
    return name, [] if name == "rmipo" else [methods[name]]


def named_files(folder: str) -> dict[str, str]:
    """name -> path of the YAML files in `folder`."""
    return {path.stem: str(path) for path in sorted(Path(folder).glob("*.yaml"))}


def split_args(env: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(overlays, overrides) in ARGS."""
    parser = Parser(prog="ARGS", allow_abbrev=False, add_help=False)
    parser.add_argument("--overlay", action="append", default=[])
    known, overrides = parser.parse_known_args(split(env.get("ARGS", "")))
    return known.overlay, overrides


def choose_sharding(env: Mapping[str, str]) -> str:
    """SHARDING, a file of configs/accelerate/; empty if it is not set."""
    name = env.get("SHARDING", "")
    return name and choose("SHARDING", name, list(named_files("configs/accelerate")), "Files in configs/accelerate")


def gpus_asked_for(env: Mapping[str, str]) -> int | None:
    """The number in GPUS, which may also have the GB of one, as in 8x80; None if it is not set."""
    given = env.get("GPUS", "")
    match = re.fullmatch(r"([1-9]\d*)(x\d+(\.\d+)?)?", given)  # one variable serves make plan and make train
    if given and match is None:
        raise ConfigError(f"GPUS={given!r}: expected the number of GPUs, such as GPUS=4, or with their GB, GPUS=4x80")
    return int(match[1]) if match else None


def whole_number(env: Mapping[str, str], name: str, default: int) -> int:
    """The variable `name`, `default` if it is not set. Raises ConfigError unless it is 1, 2, ..."""
    text = env.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{name}={text!r}: expected a whole number, 1 or more")
    return int(text)


def is_setting(model: str) -> bool:
    """Whether MODEL names a folder in recipes/, whose models have METHODs."""
    return (ROOT / "recipes" / model / "eval.yaml").is_file()


def known_settings() -> str:
    """For an error message."""
    return ", ".join(sorted(path.parent.name for path in ROOT.glob("recipes/*/eval.yaml")))


def check_names(model: str, methods: Iterable[str]) -> None:
    """Raises EvaluationError unless `model` is a setting, or a folder or the id of a model on the hub without methods."""
    if is_setting(model):
        return
    if not (Path(model).expanduser().is_dir() or re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", model)):
        raise EvaluationError(f"MODEL={model} is no folder, no hub id, and no setting; these are {known_settings()}")
    if methods:
        raise EvaluationError(f"METHOD={','.join(methods)} belongs to a setting, and MODEL={model} is none")


def initial_model(model_dir: str | Path, named: str | None) -> str:
    """The model that a training started from: `named`, else that of the run's recipe, else `model_dir` itself."""
    record = recorded_run(model_dir)
    return str(named or (record["recipe"]["model_name_or_path"] if record else model_dir))
