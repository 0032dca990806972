"""A page of pairs under two small models, and a real browser to read it."""

import random
import shutil
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM

from rmipo import RMiPOConfig, look
from tests.helpers.tiny_model import write_model

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--window-size=1400,1000",
)  # fmt: skip


def model_folder(folder: Path, seed: int) -> str:
    """Of a model whose log-probabilities depend on prompts by whole nats."""
    write_model(folder, seed)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.data.mul_(6)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return model_folder(folder / "before", 0), model_folder(folder / "after", 1)


@pytest.fixture(scope="session")
def pairs() -> list[dict]:
    """150 pairs of texts; some are too long for `args`, the first is a near-duplicate, the last can't be used."""
    draw = random.Random(0)
    texts = [
        [" ".join(f"w{draw.randrange(20)}" for _ in range(draw.randint(1, 24))) for _ in range(3)] for _ in range(150)
    ]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    rows[0]["chosen"] = " ".join(f"w{i}" for i in range(20))
    rows[0]["rejected"] = rows[0]["chosen"] + " w3"
    return [*rows, {"prompt": "w1", "chosen": "w2", "rejected": "w2"}]


@pytest.fixture(scope="session")
def args() -> RMiPOConfig:
    return RMiPOConfig(output_dir=".", report_to="none", bf16=False, max_length=40, max_prompt_length=16)


@pytest.fixture(scope="session")
def page(models, pairs, args, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("page") / "look.html"
    return look(models[0], Dataset.from_list(pairs), args, after=models[1], output=output)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """Chromium, as Debian packages it; what it says and asks for is logged."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("needs chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()
