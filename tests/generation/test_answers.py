"""Answers don't depend on neighbours or interruptions, and come from the distribution and the prompts they should."""

import datetime
import importlib.util
import json
import re
import sys
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.data.chat import ChatFormat
from rmipo.errors import EvaluationError
from rmipo.generation.answers import Generator, Request, check_settings
from rmipo.generation.engines import SeededSampling, TokenPrompt, TransformersEngine, VllmEngine
from tests.helpers.small_models import greedy
from tests.helpers.tiny_model import SETTINGS, generate, other_versions, requests, write_model


@pytest.fixture
def model_dir(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def seen(monkeypatch):
    found, answer = [], TransformersEngine.batch
    monkeypatch.setattr(TransformersEngine, "batch", lambda own, batch: (found.extend(batch), answer(own, batch))[1])
    return found


def test_samples_follow_softmax_of_scaled_logits():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    count = 20_000
    sampling = SeededSampling([0.5] * count, 1.0, list(range(count)))
    drawn = sampling(torch.zeros(count, 1, dtype=torch.long), logits.repeat(count, 1)).argmax(-1)
    share = torch.bincount(drawn, minlength=4) / count
    # Four standard errors of a share of 0.84 of 20,000 draws are 0.010.
    assert torch.allclose(share, (logits / 0.5).softmax(-1), atol=0.011)


@pytest.mark.parametrize(
    ("probabilities", "temperature", "top_p", "top_k", "kept"),
    [
        ([0.5, 0.3, 0.15, 0.05], 1.0, 0.7, 0, {0, 1}),  # .5 doesn't reach .7, .5 + .3 does
        ([0.1, 0.4, 0.2, 0.3], 1.0, 1.0, 2, {1, 3}),
        ([0.4, 0.3, 0.2, 0.1], 1.0, 0.5, 2, {0}),  # .4 of .7 reaches .5, .4 of 1 doesn't
        ([0.5, 0.3, 0.15, 0.05], 0.5, 0.65, 0, {0}),  # the temperature comes first: .25 of .365
    ],
)
def test_top_p_is_of_what_temperature_and_top_k_leave(probabilities, temperature, top_p, top_k, kept):
    sampling = SeededSampling([temperature] * 500, top_p, list(range(500)), top_k)
    logits = torch.tensor(probabilities).log().repeat(500, 1)
    assert set(sampling(torch.zeros(500, 1, dtype=torch.long), logits).argmax(-1).tolist()) == kept


def test_answers_end_at_every_eos_of_both_configurations(model_dir, tmp_path):
    with Generator(model_dir, SETTINGS) as generator:
        generator.answer(requests(11), tmp_path / "a.jsonl")
        assert generator.cut == 100 * generator.finishes.count("length") / 11
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()[1:]]
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("w3", "w7")]
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": ends[1]}))
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"eos_token_id": ends[:1]}))
    generate(model_dir, requests(11), tmp_path / "b.jsonl", SETTINGS)
    lines = (tmp_path / "b.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["decoding"]["stop_ids"] == sorted([1, *ends])  # the end of turn is </s>, id 1
    for before, after in zip(rows, map(json.loads, lines[1:]), strict=True):
        words = before["output"].split()
        end = next((i for i, word in enumerate(words) if word in ("w3", "w7")), None)
        assert after["output"].split() == words[:end] and (end is None or after["finish"] == "stop")
    assert any("w3" in row["output"] for row in rows)


def test_answers_do_not_depend_on_batch_or_order(model_dir, tmp_path):
    asked = requests(11)
    together = generate(model_dir, asked, tmp_path / "a.jsonl", SETTINGS)
    alone = generate(model_dir, asked, tmp_path / "b.jsonl", {**SETTINGS, "batch_size": 1})
    reversed_ = generate(model_dir, asked[::-1], tmp_path / "c.jsonl", {**SETTINGS, "batch_size": 3})
    assert together == alone == reversed_[::-1]
    other_seed = generate(model_dir, asked, tmp_path / "d.jsonl", {**SETTINGS, "seed": 43})
    assert len(set(together)) > 5 and sum(a != b for a, b in zip(together, other_seed, strict=True)) > 5


def test_little_room_in_the_context_is_not_taken_from_neighbours(model_dir, tmp_path):
    # The context has 128 tokens: BOS, <user>, words, <assistant>, and what is left for the answer.
    asked = [Request(f"q{words}", [{"role": "user", "content": "w1 " * words}]) for words in (5, 120, 118, 6, 100)]
    settings = {**SETTINGS, "batch_size": 8, "max_new_tokens": 20}
    generate(model_dir, asked, tmp_path / "together.jsonl", settings)
    generate(model_dir, asked, tmp_path / "alone.jsonl", {**settings, "batch_size": 1})
    texts = [(tmp_path / f"{name}.jsonl").read_text().splitlines()[1:] for name in ("together", "alone")]
    together, alone = ([json.loads(line) for line in lines] for lines in texts)
    assert together == alone
    room = {"q5": 20, "q120": 5, "q118": 7, "q6": 20, "q100": 20}
    cut = {row["key"]: row["tokens"] for row in together if row["finish"] == "length"}
    assert cut == {key: room[key] for key in cut} and {"q120", "q118"} <= cut.keys() and len(cut) > 2


def test_cut_files_are_continued_to_the_same_bytes(model_dir, tmp_path, monkeypatch):
    whole, found, answer = tmp_path / "whole.jsonl", [], TransformersEngine.batch
    with monkeypatch.context() as watched:
        watched.setattr(
            TransformersEngine, "batch", lambda *given: (found.append(whole.read_bytes()), answer(*given))[1]
        )
        answers = generate(model_dir, requests(11), whole, SETTINGS)
    assert [written.count(b"\n") for written in found] == [1, 5, 9]  # what a kill would leave: all batches before
    content = whole.read_bytes()
    lines = content.count(b"\n")
    assert lines == 12
    ends = [i for i, byte in enumerate(content) if byte == ord("\n")]
    cuts = {0, 5, ends[0] + 1, ends[2] + 9, ends[6] + 1, ends[8] + 1, len(content) - 1, len(content)}
    for cut in cuts:
        path = tmp_path / f"cut{cut}.jsonl"
        path.write_bytes(content[:cut])
        assert generate(model_dir, requests(11), path, SETTINGS) == answers
        assert path.read_bytes() == content, cut


def test_answers_go_on_with_the_day_that_a_template_was_told_first(model_dir, tmp_path, monkeypatch, seen):
    template, path = model_dir / "chat_template.jinja", tmp_path / "a.jsonl"
    told = "{{ bos_token }} w{{ strftime_now('%d') | int }}"
    template.write_text(template.read_text().replace("{{ bos_token }}", told, 1))

    def generate_on(day: int) -> bytes:
        read = datetime.date.fromisoformat
        today = types.SimpleNamespace(today=lambda: datetime.date(2026, 2, day), fromisoformat=read)
        monkeypatch.setattr("rmipo.generation.answers.datetime", types.SimpleNamespace(date=today))
        generate(model_dir, requests(8), path, SETTINGS)
        return path.read_bytes()

    whole = generate_on(3)
    assert json.loads(whole.splitlines()[0])["date"] == "2026-02-03"
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:5]))
    assert generate_on(4) == whole
    told = AutoTokenizer.from_pretrained(model_dir).convert_tokens_to_ids("w3")
    assert len(seen) == 12 and all(prompt.ids[1] == told for prompt in seen)


def test_finished_answers_of_another_machine_are_taken_and_others_not_continued(model_dir, tmp_path):
    path = tmp_path / "a.jsonl"
    answers = generate(model_dir, requests(5), path, SETTINGS)
    versions = other_versions(path, "vllm")
    for engine in ("auto", "vllm"):  # which need not be installed here
        with Generator(model_dir, {**SETTINGS, "engine": engine}) as generator:
            assert generator.answer(requests(5), path) == answers
        assert generator.versions == versions and generator.settings["engine"] == "vllm"
    with pytest.raises(EvaluationError, match=r"a\.jsonl .*'engine': 'vllm'.*'engine': 'transformers'"):
        generate(model_dir, requests(5), path, SETTINGS)
    versions = other_versions(path, "transformers")
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    before = path.read_bytes()
    for engine in ("auto", "transformers"):
        with pytest.raises(EvaluationError, match=re.escape(str(versions))):
            generate(model_dir, requests(5), path, {**SETTINGS, "engine": engine})
    assert path.read_bytes() == before


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_gpu_without_vllm(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(EvaluationError, match="EXTRAS=eval,vllm"):
        generate(model_dir, requests(1), tmp_path / "a.jsonl", {**SETTINGS, "engine": "auto"})
    assert not (tmp_path / "a.jsonl").exists()


def test_other_answers_are_not_taken_for_these(model_dir, tmp_path):
    path = tmp_path / "a.jsonl"
    generate(model_dir, requests(5), path, SETTINGS)
    before = path.read_bytes()
    for count, changes in ((5, {"seed": 1}), (5, {"max_new_tokens": 5}), (6, {}), (5, {})):
        if (count, changes) == (5, {}):
            write_model(model_dir, seed=1)  # other weights
        with pytest.raises(EvaluationError, match=r"a\.jsonl"):
            generate(model_dir, requests(count), path, SETTINGS | changes)
        assert path.read_bytes() == before


def test_prompts_reach_the_model_as_training_tokenised_them_or_are_refused(model_dir, tmp_path, seen):
    asked = requests(5)
    generate(model_dir, asked, tmp_path / "a.jsonl", SETTINGS)
    chat = ChatFormat.probe(AutoTokenizer.from_pretrained(model_dir))
    response = [{"role": "assistant", "content": "w1 w2"}]
    assert [prompt.ids for prompt in seen] == [chat.pair_ids(r.messages, response, response)[0] for r in asked]
    assert all(prompt.ids[0] == 0 and prompt.ids.count(0) == 1 for prompt in seen)  # id 0 is BOS
    long = Request("long", [{"role": "user", "content": "w1 " * 125}])  # with BOS, <user> and <assistant> 128 tokens
    with pytest.raises(EvaluationError, match="prompt long has 128 tokens"):
        generate(model_dir, [*requests(2), long], tmp_path / "long.jsonl", SETTINGS)
    assert not (tmp_path / "long.jsonl").exists()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    asked = [Request("q", [{"role": "user", "content": "w1"}])]
    # The template's probe is clean; only this prompt starts with a second BOS.
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{{ bos_token }}", "{{ bos_token }}{% if messages[0]['content'] == 'w1' %} {{ bos_token }}{% endif %}"
    )
    tokenizer.save_pretrained(model_dir)
    with pytest.raises(EvaluationError, match=r"prompt q .*BOS"):
        generate(model_dir, asked, tmp_path / "bos.jsonl", SETTINGS)


def test_temperature_zero_is_greedy_and_padding_in_front_of_shorter_prompts_is_not_seen(model_dir):
    engine = TransformersEngine(model_dir, check_settings(SETTINGS), [1])
    for parameter in engine.model.parameters():
        if parameter.ndim == 2:
            parameter.data *= 20  # else attention is about uniform, and what it sees hardly shows
    prompts = [TokenPrompt([0, 3, *range(5, 5 + words), 4], 0.0, seed=5) for words in (1, 4, 9, 15)]
    answers = engine.batch(prompts)
    assert answers == [engine.batch([prompt])[0] for prompt in prompts]
    for prompt, (answer, *_) in zip(prompts, answers, strict=True):
        expected = greedy(engine.model, prompt.ids, 12)
        assert answer == (expected[: expected.index(1)] if 1 in expected else expected)


def test_vllm_is_started_with_the_dtype_of_the_weights_no_code_and_no_pickle(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(LLM=lambda **given: given))
    write_model(tmp_path)
    for weights, dtype, expected in (
        (torch.float32, "bfloat16", "bfloat16"),
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=weights).save_pretrained(tmp_path)
        started = VllmEngine(tmp_path, check_settings({"dtype": dtype}), [1]).model
        assert started["trust_remote_code"] is False and started["load_format"] == "safetensors"
        assert started["dtype"] == expected
