"""The day a GPU is there: legs, planned for 45 minutes, that measure what docs/RESULTS.md lacks, and can be started again.

    python -m benchmarks.gpu_day pack               where there is a network: wheels and weights, in folders of at most 60 MiB
    python -m benchmarks.gpu_day take FOLDER        on the GPU's machine, for each of the folders, in any order
    python -m benchmarks.gpu_day run [--minutes 9]  there: the legs, one after the other, each as far as the minutes last
    python -m benchmarks.gpu_day run --dry          all legs on a CPU, on small shapes

The machine needs torch for CUDA and no network. Its packages stay as they are: wheels are installed beside them. --there
names a file with its `pip list --format=freeze`: only what that lacks, or has in an older version, is packed. Each leg writes
<output>/<leg>.json, with its exit code and the end of what it printed; a leg that has passed is not run again.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
PART = 60 * 2**20  # bytes of a folder that is taken along at once
PYTHON = "3.12"  # of the GPU's machine
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]
# The CUDA machine brings its own; of everything else the closure of `rmipo[recipes,smollm2]` is packed.
LEFT_OUT = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|rmipo)$")
SMOLLM2 = "smollm2-135m-instruct"
WEIGHTS = re.search(r"^package: (\S+)", (ROOT / f"recipes/{SMOLLM2}/weights.yaml").read_text(), re.MULTILINE)[1]


# ------------------------------------------------------------------ pack, take


def requirements() -> dict[str, str]:
    """Name -> version of everything that a run of recipes imports, as installed here."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    todo = [Requirement("rmipo[recipes,smollm2]")]
    while todo:
        wanted = todo.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        extras = [{"extra": extra} for extra in wanted.extras or [""]]
        if name in found and not wanted.extras:
            continue
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        found[name] = distribution.version
        for line in distribution.requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or any(requirement.marker.evaluate(extra) for extra in extras):
                todo.append(requirement)
    return {name: version for name, version in sorted(found.items()) if not LEFT_OUT.match(name)}


def missing(needed: dict[str, str], there: Path | None) -> dict[str, str]:
    """What of `needed` a machine's `pip list --format=freeze` lacks or has in an older version."""
    from packaging.version import Version

    installed = {}
    for line in there.read_text().splitlines() if there else []:
        name, _, version = line.partition("==")
        installed[re.sub(r"[-_.]+", "-", name).lower()] = version
    return {
        name: version
        for name, version in needed.items()
        if name not in installed or Version(installed[name]) < Version(version)
    }


def pack(output: Path, there: Path | None) -> None:
    stock = output / "stock"
    for folder in (stock, *output.glob("part-*")):
        shutil.rmtree(folder, ignore_errors=True)
    stock.mkdir(parents=True)
    platforms = [text for platform in PLATFORMS for text in ("--platform", platform)]
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(stock)]
    for name, version in missing(requirements(), there).items():
        binary = ["--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "cp", *platforms]
        if subprocess.run([*download, *binary, f"{name}=={version}"], check=False).returncode:
            wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(stock), f"{name}=={version}"]
            subprocess.run(wheel, check=True)  # published as source alone, as DeepSpeed is
        print(name, version, flush=True)
    subprocess.run([*download, WEIGHTS], check=True)
    for folder in divide(stock, output):
        print(folder)
    shutil.rmtree(stock)


def divide(stock: Path, output: Path) -> list[Path]:
    """Folders of at most PART bytes with the files of `stock`, longer ones in pieces."""
    folders, free = [], 0
    for path in sorted(stock.iterdir()):
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        pieces = [content[start : start + PART] for start in range(0, len(content), PART)]
        for number, piece in enumerate(pieces, start=1):
            if len(piece) > free:
                folders.append(output / f"part-{len(folders) + 1}")
                folders[-1].mkdir()
                free = PART
            name = f"{path.name}.{number}of{len(pieces)}.{digest[:16]}"
            (folders[-1] / name).write_bytes(piece)
            free -= len(piece)
    return folders


def take(folder: Path, output: Path) -> None:
    """Keep the pieces of `folder`, and put every file together whose pieces are all there."""
    stock = output / "stock"
    stock.mkdir(parents=True, exist_ok=True)
    for piece in folder.iterdir():
        shutil.copy(piece, stock)
    pieces: dict[tuple, dict[int, Path]] = {}
    for path in stock.iterdir():
        if match := re.fullmatch(r"(.+)\.(\d+)of(\d+)\.([0-9a-f]{16})", path.name):
            name, number, count, digest = match.groups()
            pieces.setdefault((name, int(count), digest), {})[int(number)] = path
    for (name, count, digest), found in pieces.items():
        if len(found) < count:
            print(f"{name}: {len(found)} of {count} pieces")
            continue
        content = b"".join(found[number].read_bytes() for number in range(1, count + 1))
        if hashlib.sha256(content).hexdigest()[:16] != digest:
            raise SystemExit(f"{name} arrived damaged: take its folders again")
        (stock / name).write_bytes(content)
        for path in found.values():
            path.unlink()


# ------------------------------------------------------------------ legs


def legs(output: Path, dry: bool) -> dict[str, list[list[str]]]:
    """Leg -> its commands, in order. All can be started again: benchmarks write new files, trainings go on."""
    python, stamp = sys.executable, f"{time.time():.0f}"
    model = "tiny" if dry else SMOLLM2
    flag = ["--dry"] * dry
    step = [python, "-m", "benchmarks.gpu", *flag, "--output", str(output / f"step-{stamp}.json")]
    liger = [python, "-m", "benchmarks.gpu", "--liger", "--micro-batches", "4", "--output"]
    small = ["--rounds", "1", "--micro-batches", "2"] if dry else []
    study = {
        "MODEL": model,
        "METHODS": "simpo" if dry else "rmipo,simpo,dpo",
        "SEEDS": "0" if dry else "0,1",
        "NOISE": "0",
    }
    study |= {"ARGS": "--max_steps 2" if dry else "--num_train_epochs 2 --global_batch_size 8"}
    prepare = [] if dry else [["env", f"MODEL={model}", python, "scripts/pairs.py"]]
    if not dry:
        weights = f"recipes/{SMOLLM2}/weights.yaml"
        to = f"outputs/{SMOLLM2}/weights"
        prepare.insert(0, [python, "scripts/weights.py", "--config", weights, "--output", to])
    smoke = ["env", "MODEL=tiny", "SHARDING=zero3", "GPUS=1", *([] if dry else ["ARGS=--use_cpu false"])]
    return {
        "kernels": [[python, "-m", "benchmarks.gpu_kernels", *flag, "--output", str(output / f"kernels-{stamp}.json")]],
        "step": [[*step, *small]],
        "liger": [] if dry else [[*liger, str(output / f"liger-{stamp}.json")]],
        "resume": [[*smoke, python, "scripts/smoke.py"]],
        "study": [*prepare, ["env", *(f"{key}={value}" for key, value in study.items()), python, "scripts/compare.py"]],
    }


def environment(output: Path, root: Path) -> dict[str, str]:
    """With the wheels that were taken along in front of what the machine has, and no network."""
    site, stock = (output / "site").resolve(), output / "stock"
    wheels = [
        path for path in stock.glob("*.whl") if not path.name.startswith(WEIGHTS.partition("==")[0].replace("-", "_"))
    ]
    if wheels and not site.is_dir():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*install, *map(str, wheels)], check=True)
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
            ended[name] = True
            continue
        results = []
        for command in commands:
            left = deadline - time.monotonic()
            late = {"command": command, "code": "no time left"}
            results.append(run_command(command, root, env, left) if left > 20 else late)
            if results[-1]["code"] != 0:
                break
        ended[name] = all(result["code"] == 0 for result in results)
        path.write_text(json.dumps({"passed": ended[name], "commands": results}, indent=1) + "\n")
        print(f"{name}: {'passed' if ended[name] else 'see ' + str(path)}", flush=True)
    return 0 if all(ended.values()) else 1


def run_command(command: list[str], root: Path, env: dict[str, str], seconds: float) -> dict:
    """Its exit code, or "out of time"; the end of its output, which is shown as it comes."""
    print(" ".join(command), flush=True)
    start, lines = time.monotonic(), []
    program = subprocess.Popen(command, cwd=root, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    stopper = threading.Timer(seconds, program.terminate)  # ends it in time even while it prints nothing
    stopper.start()
    for line in program.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    code = program.wait()
    if stopper.finished.is_set():
        code = "out of time"
    stopper.cancel()
    return {"command": command, "code": code, "seconds": time.monotonic() - start, "output": "".join(lines)[-4000:]}


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
