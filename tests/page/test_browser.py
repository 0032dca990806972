"""The page in a real browser: what its reader does, and that no text does anything."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml

from rmipo.objectives import build_objective
from rmipo.objectives.rmipo import SCHEDULES, delta_pmi, response_pmi, scheduled_margin
from rmipo.page.look import write

HOSTILE = [
    "<script>document.title = 'taken'</script>", "</script><img src=x onerror=\"document.title = 'taken'\">", "<!--<script>",
    "{{ 7 * 7 }}{% raw %}", "\u202eright to left \u05d0", "\ud800 lone \udfff", "https://example.org/x.png", "w" * 100_000,
    "&lt;b&gt;\0\u2028'\"`${1}",
]  # fmt: skip


class Reader:
    """Someone at the page."""

    def __init__(self, driver, path: Path):
        self.driver = driver
        for log in ("browser", "performance"):
            driver.get_log(log)  # of the page before
        driver.get(path.as_uri())

    def __call__(self, code: str, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, selector: str):
        return self.driver.find_element("css selector", selector)

    def type(self, selector: str, text: str) -> None:
        self.find(selector).clear()
        self.find(selector).send_keys(text)

    def choose(self, name: str, value: str) -> None:
        self.find(f"#controls [name={name}] option[value={value}]" if name == "pmi_normalization"
                  else f"#controls [name={name}] option:nth-child({[*SCHEDULES].index(value) + 1})").click()  # fmt: skip

    def column(self, title: str) -> list[str]:
        heads = self("return [...document.querySelectorAll('#list th')].map(head => head.textContent)")
        place = heads.index(title) + 1
        cells = f"[...document.querySelectorAll('#list td:nth-child({place})')]"
        return self(f"return {cells}.map(cell => cell.textContent)")

    def numbers(self, title: str) -> list[float]:
        return [float(text.replace("−", "-")) for text in self.column(title)]

    def sort(self, title: str) -> None:
        heads = "[...document.querySelectorAll('#list th button')]"
        self(f"{heads}.find(head => head.textContent === arguments[0]).click()", title)

    def open_pair(self) -> int:
        return int(re.search(r"Pair (\d+)", self.find("#pair h2").text)[1])

    def asked(self) -> list[str]:
        """What pages have asked for, but for those of the browser itself, such as its new tab."""
        entries = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [entry["params"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]
        urls = [request["request"]["url"] for request in sent if not request["documentURL"].startswith("chrome:")]
        return [url for url in urls if not url.startswith("data:")]

    def shown(self) -> int:
        return int(re.match(r"\d+", self.find("#shown").text)[0])


@pytest.fixture
def reader(driver, page):
    return Reader(driver, page)


@pytest.fixture(scope="module")
def summary(page) -> dict:
    return json.loads(re.search(r'id="summary">(.*?)</script>', page.read_text("utf-8"), re.DOTALL)[1])


def test_filters_and_their_combination(reader, summary):
    pairs = summary["pairs"]
    delta = [difference(pair["sides"], "token") for pair in pairs]
    gap = [chosen[0] / chosen[2] - rejected[0] / rejected[2] for chosen, rejected in (pair["sides"] for pair in pairs)]
    spread = [math.sqrt(sum(x * x for x in values) / len(values)) for values in (delta, gap)]
    holds = {
        "max": [d <= 0 for d in delta],
        "less": [a < 0 for a in gap],
        "cut": [pair["cut"] for pair in pairs],
        "alike": [pair["alike"] for pair in pairs],
        "swapped": [d < -spread[0] and a < -spread[1] for d, a in zip(delta, gap, strict=True)],
    }
    for name, expected in holds.items():
        reader.find(f"#filters [name={name}]").click()
        assert 0 < sum(expected) < 150 and reader.shown() == sum(expected), name
        reader.find(f"#filters [name={name}]").click()
    for name in ("max", "cut"):
        reader.find(f"#filters [name={name}]").click()
    assert reader.shown() == sum(a and b for a, b in zip(holds["max"], holds["cut"], strict=True))
    assert reader.open_pair() - 1 in [i for i in range(150) if holds["max"][i] and holds["cut"][i]]


def difference(sides, reading, fidelity="paper"):
    given, prior, lengths, _ = torch.tensor(sides, dtype=torch.float64).unbind(1)
    return delta_pmi(*response_pmi(given, prior, lengths, reading, fidelity)).item()


@pytest.mark.parametrize("reading", ["token", "sequence"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_controls_recompute_what_training_would(reader, summary, schedule, reading):
    reader.choose("schedule", schedule)
    reader.choose("pmi_normalization", reading)
    for name, value in (("beta", "3.5"), ("gamma_min", "0.45"), ("gamma_max", "1.25")):
        reader.type(f"#controls [name={name}]", value)
    delta = torch.tensor([difference(pair["sides"], reading) for pair in summary["pairs"]], dtype=torch.float64)
    gamma = scheduled_margin(delta, 0.45, 1.25, schedule)
    found = torch.tensor(reader("return pairs.map(pair => pair.gamma)"), dtype=torch.float64)
    torch.testing.assert_close(found, gamma, atol=1e-6, rtol=0)
    reward = torch.tensor([3.5 * (w[0] / w[2] - r[0] / r[2]) for w, r in (pair["sides"] for pair in summary["pairs"])])
    weight = torch.tensor(reader("return pairs.map(pair => pair.weight)"))
    torch.testing.assert_close(weight, torch.sigmoid(gamma.float() - reward), atol=1e-5, rtol=0)
    reader.sort("pair") if reader("return order[0]") != "pair" else None
    assert reader.numbers("γ")[:9] == pytest.approx(gamma[:9].tolist(), abs=6e-4)
    share = "0.85" if schedule == "constant" else f"{round(100 * (gamma >= 1.25 - 1e-6).double().mean().item())}%"
    assert reader.find("#verdict div").text.startswith(share)

    block = yaml.safe_load(reader.find("#recipe").text)["objective"]
    assert build_objective(block) == build_objective(
        {"name": "rmipo", "beta": 3.5, "gamma_min": 0.45, "gamma_max": 1.25, "schedule": schedule,
         "pmi_normalization": reading}
    )  # fmt: skip
    reader.type("#controls [name=gamma_min]", "7")  # above gamma_max: nothing changes
    assert yaml.safe_load(reader.find("#recipe").text)["objective"] == block
    reader.find("#reset").click()
    assert reader("return settings") == summary["objective"]


def test_one_pair_shows_its_tokens_its_cuts_and_another_prompt(reader, page, summary):
    stored = [json.loads(text) for text in re.findall(r'class="pair">(.*?)</script>', page.read_text("utf-8"))]
    number = next(i for i, pair in enumerate(stored) if pair["sides"][1]["lost"] and not pair["sides"][0]["lost"])
    reader("show(pairs[arguments[0]])", number)
    chosen, rejected = reader.driver.find_elements("css selector", ".sides > div")
    assert chosen.find_elements("css selector", ".special")[-1].text.strip() == "</s>"
    assert "</s>" in rejected.find_element("css selector", ".cut").text
    assert not rejected.find_elements("css selector", ".special")
    sides = summary["pairs"][number]["sides"]
    for node, (given, prior, tokens, _) in zip((chosen, rejected), sides, strict=True):
        heading = node.find_element("css selector", "h3").text.replace("−", "-")
        assert f"{tokens} tokens" in heading and f"{given:.2f}" in heading and f"PMI {given - prior:.2f}" in heading
        tips = [span.get_attribute("data-tip") for span in node.find_elements("css selector", ".token")]
        scored = [[float(x) for x in re.findall(r" (-?\d+\.\d{4})", tip.replace("−", "-"))] for tip in tips]
        assert sum(values[0] for values in scored) == pytest.approx(given, abs=1e-2)
        assert sum(values[1] for values in scored) == pytest.approx(prior, abs=1e-2)
        assert all(a - b == pytest.approx(c, abs=2e-4) for a, b, c in scored)
    prompt = reader.find("#prompt").text
    own = [node.find_element("css selector", "h3").text for node in (chosen, rejected)]
    reader.find("#other input").click()
    assert reader.find("#prompt").text != prompt
    assert [node.find_element("css selector", "h3").text for node in (chosen, rejected)] != own
    assert f"pair {stored[number]['other'] + 1}" in reader.find("#other").text


def test_after_shows_how_the_pairs_moved(reader, summary):
    moved = [difference(pair["after"], "token") for pair in summary["pairs"]]
    gamma = scheduled_margin(torch.tensor(moved), 0.3, 1.6, "exponential")
    assert reader.numbers("γ after") == pytest.approx(gamma[:100].tolist(), abs=6e-4)
    text = reader.find("#after").text.replace("−", "-")
    before = [difference(pair["sides"], "token") for pair in summary["pairs"]]
    means = [sum(values) / len(values) for values in (before, moved)]
    shares = [round(100 * sum(value > 0 for value in values) / 150) for values in (before, moved)]
    assert f"{means[0]:.2f} → {means[1]:.2f}" in text and f"{shares[0]}% → {shares[1]}%" in text


def test_hostile_text_stays_text(driver, page, summary, tmp_path):
    stored = json.loads(re.search(r'class="pair">(.*?)</script>', page.read_text("utf-8"))[1])

    def hostile(value, text):
        if isinstance(value, dict):
            kept = ("given", "prior", "other", "objective", "findings")
            return {key: part if key in kept else hostile(part, text) for key, part in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], str):
            return [text, *value[1:]]
        if isinstance(value, list):
            return [hostile(part, text) for part in value]
        return text if isinstance(value, str) else value

    said = json.loads(json.dumps(summary))
    said["pairs"] = [dict(said["pairs"][0], index=i, title=text) for i, text in enumerate(HOSTILE)]
    said |= {name: "".join(HOSTILE) for name in ("about", "model", "after", "reasons")}
    write(tmp_path / "hostile.html", (hostile(stored, text) | {"other": 0} for text in HOSTILE), lambda: said)
    reader = Reader(driver, tmp_path / "hostile.html")
    elements = reader("return document.querySelectorAll('script, img, b, iframe').length")
    for number, text in enumerate(HOSTILE):
        reader("show(pairs[arguments[0]])", number)
        # Lone surrogates can't pass the driver.
        length = reader("return document.querySelector('.sides .token').textContent.length")
        assert length == len(text.encode("utf-16-le", "surrogatepass")) // 2
        token = "document.querySelector('.sides .token').textContent"
        assert reader(f"return {token} === detail(current).sides[0].tokens[0]")
        assert reader("return document.querySelectorAll('#list .open').length") == 1
    reader.find("#other input").click()
    reader.type("#search", "7 * 7 }}")
    assert reader.shown() == 1 and reader.driver.title == "What the margin does to your pairs"
    assert reader("return document.querySelectorAll('script, img, b, iframe').length") == elements
    assert driver.get_log("browser") == [] and reader.asked() == [(tmp_path / "hostile.html").as_uri()]
    assert reader("return document.documentElement.scrollWidth <= innerWidth")
