"""What the page is told: log-probabilities against plain forwards, what was cut, and how `make look` is asked."""

import base64
import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo import look
from rmipo.data.chat import PROBES, ChatFormat
from rmipo.page.look import findings
from tests.helpers.programs import run_here
from tests.references.padded import padded_token_logps


def read(page) -> tuple[list[dict], dict]:
    text = page.read_text("utf-8")
    (summary,) = re.findall(r'id="summary">(.*?)</script>', text, re.DOTALL)
    return [json.loads(pair) for pair in re.findall(r'class="pair">(.*?)</script>', text)], json.loads(summary)


def test_token_values_equal_plain_forwards(page, pairs, models, args):
    """A prompt keeps its BOS and its end, a response what fits behind it; another prompt the end that fits before both."""
    stored, summary = read(page)
    tokenizer, model = AutoTokenizer.from_pretrained(models[0]), AutoModelForCausalLM.from_pretrained(models[0])

    def ids(text):
        return tokenizer.convert_tokens_to_ids(text.split())

    prompts = [ids(f"<user> {row['prompt']} <assistant>")[-args.max_prompt_length + 1 :] for row in pairs[:150]]
    for number in range(0, 150, 5):
        prompt, other = (ids("<s>") + prompts[which] for which in (number, stored[number]["other"]))
        both = [ids(f"{pairs[number][side]} </s>")[: args.max_length - len(prompt)] for side in ("chosen", "rejected")]
        foreign = other[-(args.max_length - max(map(len, both))) :]
        for own, side, sums in zip(both, stored[number]["sides"], summary["pairs"][number]["sides"], strict=True):
            with torch.no_grad():
                expected = padded_token_logps(model, [(prompt, own), (ids("<s> <assistant>"), own), (foreign, own)])
            for key, wanted in zip(("given", "prior", "other"), expected, strict=True):
                found = torch.frombuffer(bytearray(base64.b64decode(side[key])), dtype=torch.float32)
                torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0, msg=f"{number} {key}")
            assert sums == pytest.approx([*(float(v.sum()) for v in expected[:2]), len(own), len(own)], abs=1e-2)
            assert (len(own) - 1 in side["special"]) == (side["lost"] == 0)


def test_what_is_dropped_cut_and_alike_is_counted(page, pairs):
    stored, summary = read(page)
    assert len(stored) == len(summary["pairs"]) == 150 and summary["dropped"] == 1
    assert [line["row"] for line in summary["pairs"]] == [*range(150)]
    assert [line["index"] for line in summary["pairs"] if line["alike"]] == [0]
    for pair, line, row in zip(stored, summary["pairs"], pairs, strict=False):
        lost = [pair["prompt"]["lost"], *(side["lost"] for side in pair["sides"])]
        words = len(row["prompt"].split()) + 3
        assert lost[0] == max(0, words - 16) and line["cut"] == (sum(lost) > 0)
        bos, *end = pair["prompt"]["text"].split()  # what is cut off was between them
        prompt = [bos, *pair["prompt"]["cut"].split(), *end]
        assert prompt == ["<s>", "<user>", *row["prompt"].split(), "<assistant>"]
        for name, side in zip(("chosen", "rejected"), pair["sides"], strict=True):
            whole = ("".join(side["tokens"]) + " " + side["cut"]).split()
            assert whole == [*row[name].split(), "</s>"] and len(whole) == len(side["tokens"]) + side["lost"]


def test_every_pair_has_its_own_way_to_the_second_model(models, pairs, args, tmp_path):
    args = dataclasses.replace(args, max_dropped_fraction=1.0)
    rows = Dataset.from_list([pairs[-1], *pairs[:8]])  # the first can't be used
    _, both = read(look(models[0], rows, args, after=models[1], output=tmp_path / "both.html"))
    _, second = read(look(models[1], rows, args, output=tmp_path / "second.html"))
    for line, wanted in zip(both["pairs"], second["pairs"], strict=True):
        np.testing.assert_allclose(line["after"], wanted["sides"], atol=1e-3)


@pytest.mark.parametrize("fidelity", ["paper", "release"])
def test_every_reading_is_what_training_reads(models, pairs, args, tmp_path, fidelity):
    """The sums of the page, against those of the trainer's own evaluation."""
    from rmipo import RMiPOTrainer

    args = dataclasses.replace(args, fidelity=fidelity, max_dropped_fraction=1.0, output_dir=str(tmp_path))
    rows = Dataset.from_list(pairs[:20])
    _, summary = read(look(models[0], rows, args, output=tmp_path / "look.html"))
    trainer = RMiPOTrainer(models[0], args, train_dataset=rows, eval_dataset=rows)
    trainer.evaluate()
    given, prior, lengths, prior_lengths = np.array([line["sides"] for line in summary["pairs"]]).transpose(2, 1, 0)
    rewards, columns = args.beta * given / lengths, trainer.eval_columns
    expected = columns["chosen_rewards"] - columns["rejected_rewards"]
    np.testing.assert_allclose(rewards[0] - rewards[1], expected, atol=1e-4)
    pmi = given / lengths - prior / prior_lengths.clip(min=1)
    np.testing.assert_allclose(pmi[0] - pmi[1], columns["delta_pmi"], atol=1e-4)
    related = np.corrcoef(columns["delta_pmi"], lengths[0] - lengths[1])[0, 1]
    assert summary["findings"]["token"][1]["number"] == f"{related:z.2f}".replace("-", "\N{MINUS SIGN}")


def test_pairs_are_scored_in_the_precision_of_the_training(models, pairs, args, tmp_path):
    rows, sides = Dataset.from_list(pairs[:4]), []
    for bf16 in (False, True):
        _, summary = read(look(models[0], rows, dataclasses.replace(args, bf16=bf16), output=tmp_path / "look.html"))
        sides.append(np.array([line["sides"] for line in summary["pairs"]]))
    assert 1e-3 < np.abs(sides[0] - sides[1]).max() < 1


def test_a_sample_is_the_same_each_time_and_names_rows_of_the_data(models, pairs, args, tmp_path):
    rows = []
    for _ in range(2):
        stored, summary = read(look(models[0], Dataset.from_list(pairs), args, pairs=9, output=tmp_path / "look.html"))
        rows.append([line["row"] for line in summary["pairs"]])
    assert rows[0] == rows[1] == sorted(rows[0]) and len(set(rows[0])) == len(stored) == 9 and rows[0] != [*range(9)]
    line = summary["pairs"][4]
    assert line["title"].split() == pairs[line["row"]]["prompt"].split()


def test_every_character_is_the_text_of_one_token(smollm2):
    chat = ChatFormat.probe(AutoTokenizer.from_pretrained(smollm2))
    for text in ("Grüße, 数学! 🧮🤖 end", "  two  spaces\n\n\ttab", "\u0915\u094d\u0937 क्ष", "e\u0301"):
        ids = chat.tokenizer(text)["input_ids"]
        pieces = chat.pieces(ids)
        assert "".join(pieces) == text and len(pieces) == len(ids)


def test_findings_tell_noise_from_what_is_beyond_it():
    """100 pairs: per token no reading of the labels and no relation to length; summed, both."""
    lengths = torch.arange(100) % 10 + 1
    delta = torch.tensor([1.0, -1.0]).repeat(50) * torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(25)
    sides = [[[-2.0 * (n + 5), -2.0 * (n + 5) - (n + 5) * d, n + 5, n + 5], [-10.0, -10.0, 5, 5]]
             for n, d in zip(lengths.tolist(), delta.tolist(), strict=True)]  # fmt: skip
    token = findings(sides, "paper")["token"]
    assert [(found["number"], found["noise"]) for found in token] == [("50%", True), ("0.00", True)]
    sides = [[[-10.0, -10.0 - n, 5 + n, 5 + n], [-10.0, -10.0, 5, 5]] for n in lengths.tolist()]
    higher, related = findings(sides, "paper")["sequence"]
    assert (higher["number"], higher["range"], higher["noise"]) == ("100%", "95%: 100% to 100%", False)
    assert "agrees" in higher["text"] and related["number"] == "1.00" and "smaller" in related["text"]


def test_make_look_by_folder_and_file(models, pairs, tmp_path):
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    env = {"MODEL": models[0], "AFTER": models[1], "DATA": str(tmp_path / "pairs.jsonl"), "PAIRS": "12"}
    ended = run_here("look", "--outputs", str(tmp_path), "--max_length", "40", "--max_prompt_length=16", env=env)
    assert ended.code == 0, ended.err
    stored, summary = read(tmp_path / "reports/look-before.html")
    assert "at most 40 tokens" in summary["about"] and len(stored) == 12 and summary["after"] == models[1]
    ended = run_here("look", "--outputs", str(tmp_path), "--max_length", "40", "--split", "test", env=env)
    assert ended.code == 0 and len(read(tmp_path / "reports/look-before.html")[0]) == 8, ended.err  # 5% of 151


def test_a_runs_pairs_are_shown_with_its_own_objective(models, pairs, tmp_path):
    folder = shutil.copytree(models[0], tmp_path / "run")
    probe = [ChatFormat.probe(AutoTokenizer.from_pretrained(folder)).prompt_ids(messages) for messages in PROBES]
    recipe = {"dataset_name": "elsewhere", "max_length": 30, "objective": {"name": "rmipo", "gamma_max": 1.2}}
    (folder / "run.json").write_text(json.dumps({"finished": True, "prompt_probe": probe, "recipe": recipe}))
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    env = {"MODEL": str(folder), "DATA": str(tmp_path / "pairs.jsonl"), "PAIRS": "4"}
    ended = run_here("look", "--outputs", str(tmp_path), "--max_prompt_length=16", env=env)
    assert ended.code == 0, ended.err
    _, summary = read(tmp_path / "reports/look-run.html")
    assert "at most 30 tokens" in summary["about"] and summary["objective"]["gamma_max"] == 1.2
