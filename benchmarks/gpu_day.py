"""The day a GPU is there: legs, planned for 45 minutes, that measure what docs/RESULTS.md lacks, and can be started again.

    python -m benchmarks.gpu_day pack               where there is a network: wheels and weights, in folders of at most 60 MiB
    python -m benchmarks.gpu_day take FOLDER        on the GPU's machine, for each of the folders, in any order
    python -m benchmarks.gpu_day run [--minutes 9]  there: the legs, one after the other, each as far as the minutes last
    python -m benchmarks.gpu_day run --dry          all legs on a CPU, on small shapes

The machine needs torch for CUDA and no network. Its packages stay as they are: wheels are installed beside them. --there
names a file with its `pip list --format=freeze`: only what that lacks, or has in an older version, is packed. Each leg writes
<output>/<leg>.log and <leg>.json with its exit codes; a leg that has passed is not run again.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parent.parent
PART = 60 * 2**20  # bytes of a folder that is taken along at once
# The CUDA machine, of Python 3.12, brings its own; everything else that is installed here is packed.
LEFT_OUT = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|rmipo)$")
BINARY = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
BINARY += [text for minor in (28, 27, 17) for text in ("--platform", f"manylinux_2_{minor}_x86_64")]
BINARY += ["--platform", "manylinux2014_x86_64"]
SMOLLM2 = "smollm2-135m-instruct"
WEIGHTS = re.search(r"^package: (\S+)", (ROOT / f"recipes/{SMOLLM2}/weights.yaml").read_text(), re.MULTILINE)[1]


# ------------------------------------------------------------------ pack, take


def installed() -> dict[str, str]:
    """Name -> version of everything that is installed here and not the CUDA machine's own."""
    found = {canonicalize_name(one.name): one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if not LEFT_OUT.match(name)}


def missing(needed: dict[str, str], there: Path | None) -> dict[str, str]:
    """What of `needed` a machine's `pip list --format=freeze` lacks or has in an older version."""
    lines = [line.partition("==") for line in there.read_text().splitlines()] if there else []
    has = {canonicalize_name(name): Version(version) for name, _, version in lines if version}
    return {name: version for name, version in needed.items() if name not in has or has[name] < Version(version)}


def pack(output: Path, there: Path | None) -> None:
    stock = output / "stock"
    for folder in (stock, *output.glob("part-*")):
        shutil.rmtree(folder, ignore_errors=True)
    stock.mkdir(parents=True)
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(stock)]
    for name, version in missing(installed(), there).items():
        if subprocess.run([*download, *BINARY, f"{name}=={version}"], check=False).returncode:
            wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(stock), f"{name}=={version}"]
            subprocess.run(wheel, check=True)  # published as source alone, as DeepSpeed is
        print(name, version, flush=True)
    subprocess.run([*download, WEIGHTS], check=True)
    divide(stock, output)


def divide(stock: Path, output: Path) -> list[Path]:
    """Folders of at most PART bytes with pieces of one archive of `stock`."""
    with tarfile.open(output / "stock.tar", "w") as archive:
        archive.add(stock, "stock")
    content = (output / "stock.tar").read_bytes()
    starts, folders = range(0, len(content), PART), []
    for number, start in enumerate(starts, start=1):
        folders.append(output / f"part-{number}")
        folders[-1].mkdir()
        (folders[-1] / f"{number:03}-of-{len(starts):03}").write_bytes(content[start : start + PART])
    return folders


def take(folder: Path, output: Path) -> None:
    """Keep the piece in `folder`, and unpack the archive once all of its pieces are there."""
    shutil.copytree(folder, output / "pieces", dirs_exist_ok=True)
    pieces = sorted((output / "pieces").iterdir())
    count = int(pieces[0].name[-3:])
    print(f"{len(pieces)} of {count} pieces")
    if len(pieces) == count:
        (output / "stock.tar").write_bytes(b"".join(piece.read_bytes() for piece in pieces))
        shutil.unpack_archive(output / "stock.tar", output, filter="data")


# ------------------------------------------------------------------ legs


def legs(output: Path, dry: bool) -> dict[str, list[list[str]]]:
    """Leg -> its commands, in order. All can be started again: benchmarks write new files, trainings go on."""
    python, stamp, flag = sys.executable, f"{time.time():.0f}", ["--dry"] * dry
    kernels = [python, "-m", "benchmarks.gpu_kernels", *flag, "--output", str(output / f"kernels-{stamp}.json")]
    step = [python, "-m", "benchmarks.gpu", *flag, "--output", str(output / f"step-{stamp}.json")]
    small = ["--rounds", "1", "--micro-batches", "2"] if dry else []
    liger = [python, "-m", "benchmarks.gpu", "--liger", "--micro-batches", "4", "--output"]
    smoke = ["env", "MODEL=tiny", "SHARDING=zero3", "GPUS=1", *([] if dry else ["ARGS=--use_cpu false"])]
    study = ["env", "NOISE=0", f"MODEL={'tiny' if dry else SMOLLM2}"]
    study += ["METHODS=simpo", "SEEDS=0"] if dry else ["METHODS=rmipo,simpo,dpo", "SEEDS=0,1"]
    study += ["ARGS=--max_steps 2" if dry else "ARGS=--num_train_epochs 2 --global_batch_size 8"]
    weights = ["--config", f"recipes/{SMOLLM2}/weights.yaml", "--output", f"outputs/{SMOLLM2}/weights"]
    prepare = [[python, "scripts/weights.py", *weights], ["env", f"MODEL={SMOLLM2}", python, "scripts/pairs.py"]]
    if dry:
        prepare = [["env", "MODEL=tiny", "STAGE=sft", python, "scripts/launch.py"]]
    return {
        "kernels": [kernels],
        "step": [[*step, *small]],
        "liger": [] if dry else [[*liger, str(output / f"liger-{stamp}.json")]],
        "resume": [[*smoke, python, "scripts/smoke.py"]],
        "study": [*prepare, [*study, python, "scripts/compare.py"]],
    }


def environment(output: Path, root: Path) -> dict[str, str]:
    """With the wheels that were taken along in front of what the machine has, and no network."""
    site, stock = (output / "site").resolve(), output / "stock"
    own = WEIGHTS.partition("==")[0].replace("-", "_")
    wheels = [str(path) for path in stock.glob("*.whl") if not path.name.startswith(own)]
    if wheels and not site.is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*install, *wheels], check=True)
    path = os.pathsep.join(filter(None, [str(root), str(site), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": path, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(stock.resolve())}


def run(output: Path, minutes: float, only: Iterable[str], dry: bool) -> int:
    """Exit code 0 once every leg has passed."""
    output = (output / "dry" if dry else output).resolve()  # a trial's results are not those of the day
    output.mkdir(parents=True, exist_ok=True)
    root = output / "checkout" if dry else ROOT  # a trial leaves the outputs of real runs alone
    if dry:
        ignored = shutil.ignore_patterns("outputs", ".*", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, root, ignore=ignored, dirs_exist_ok=True)
    deadline, env, ended = time.monotonic() + 60 * minutes, environment(output, root), {}
    for name, commands in legs(output, dry).items():
        path = output / f"{name}.json"
        if only and name not in only:
            continue
        if path.is_file() and json.loads(path.read_text())["passed"]:
            print(f"{name}: has passed, see {path}", flush=True)
            continue
        codes = []
        for command in commands:
            codes.append(run_command(command, root, env, path.with_suffix(".log"), deadline - time.monotonic()))
            if codes[-1] != 0:
                break
        ended[name] = codes == [0] * len(commands)
        path.write_text(json.dumps({"passed": ended[name], "codes": codes}) + "\n")
        print(f"{name}: {'passed' if ended[name] else codes}, see {path.with_suffix('.log')}", flush=True)
    return 0 if all(ended.values()) else 1


def run_command(command: list[str], root: Path, env: dict[str, str], log: Path, seconds: float) -> int | str:
    """Its exit code, or "out of time"; what it prints goes to `log`."""
    print(" ".join(command), flush=True)
    with open(log, "a") as output:
        program = subprocess.Popen(command, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT)
        try:
            return program.wait(max(0, seconds))
        except subprocess.TimeoutExpired:
            program.terminate()  # a training saves first
            program.wait()
            return "out of time"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "take", "run"])
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu_day")
    parser.add_argument("--there", type=Path, help="pip list --format=freeze of the GPU's machine")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--legs", default="", help="some of kernels,step,liger,resume,study; default: all")
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    if options.action == "pack":
        pack(options.output, options.there)
    elif options.action == "take":
        take(options.folder, options.output)
    else:
        return run(options.output, options.minutes, options.legs.split(",") if options.legs else [], options.dry)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
