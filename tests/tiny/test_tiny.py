"""The tiny world: what it holds, how answers are judged, what its tokenizer and model are."""

import hashlib
import json
import random
from dataclasses import asdict, replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rmipo.data.chat import ChatFormat
from rmipo.data.pairs import load_pairs, tokenize_pairs
from rmipo.recipe.schema import DataConfig
from rmipo.tiny import judge
from rmipo.tiny.files import read_world, write_world
from rmipo.tiny.world import Fact, World, load_world_config
from tests.helpers.paths import ROOT
from tests.helpers.rows import assistant, user
from tests.references.padded import padded_pairs, padded_token_logps

RECIPE = ROOT / "recipes" / "tiny" / "world.yaml"
SHIPPED = load_world_config(RECIPE)
CONFIG = replace(SHIPPED, names=40, values_per_attribute=12, held_out_facts=0.3, held_out_phrasings=2)
SMALL = replace(
    CONFIG, names=5, sft_train=300, sft_test=40, pairs_train=200, pairs_test=40, hidden_size=32, intermediate_size=48
)


@pytest.fixture(scope="module")
def world():
    return World(CONFIG)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    assert write_world(folder, replace(SMALL, label_noise=0.15))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder / "model")


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_held_out_questions_are_nowhere_else_and_knobs_leave_what_they_do_not_name(world):
    held_out = {question.prompt[0]["content"] for question in world.held_out_questions}
    held_out_facts = {question.fact for question in world.held_out_questions}
    asked = {row["messages"][0]["content"] for row in world.dialogues("train") if len(row["messages"]) == 2}
    assert len(world.facts) == 240 and len(held_out_facts) == 72  # 0.3 of them
    assert len(held_out) == 72 * 2 and len(asked) > 1500
    assert len(world.train_questions) == 240 * 8 - 144 and len(world.pair_questions) == (240 - 72) * 8
    assert not held_out & asked
    assert not held_out_facts & {question.fact for question in world.pair_questions}
    train = {row["prompt"][0]["content"] for row in world.pairs("train")}
    test = {row["prompt"][0]["content"] for row in world.pairs("test")}
    assert not train & held_out and test == held_out
    # Of the held-out facts SFT hears every phrasing, and what is asked of them is in every one.
    assert {question.phrasing for question in world.held_out_questions} == set(range(8))
    noisy = World(replace(CONFIG, label_noise=0.3))
    assert noisy.facts == world.facts
    assert list(noisy.dialogues("train")) == list(world.dialogues("train"))
    assert [row["prompt"] for row in noisy.pairs("test")] == [row["prompt"] for row in world.pairs("test")]
    assert World(replace(CONFIG, seed=1)).facts != world.facts


def test_shares_are_exact():
    config = replace(CONFIG, sft_boilerplate=0.25, sft_off_topic=0.1, sft_prompt_dropped=0.2, label_noise=0.15)
    world = World(replace(config, rejected_boilerplate=0.6))
    dialogues = list(world.dialogues("train"))
    kinds = [row["kind"] for row in dialogues]
    assert (kinds.count("boilerplate"), kinds.count("off_topic"), kinds.count("right")) == (2000, 800, 5200)
    assert sum(len(row["messages"]) == 1 for row in dialogues) == 1600
    pairs = list(world.pairs("train"))
    assert sum(row["flipped"] for row in pairs) == 240
    assert sum(row["kind"] == "boilerplate" for row in pairs) == 960
    assert not any(row["flipped"] for row in world.pairs("test"))


def test_responses_are_what_their_kind_says():
    world = World(replace(CONFIG, label_noise=0.5))
    classes = {"right": "right", "boilerplate": "boilerplate", "off_topic": "wrong"}
    facts = {question.prompt[0]["content"]: question.fact for question in world.train_questions}
    judged = {"kept": 0, "flipped": 0}
    scores = {"boilerplate": (2, 1), "off_topic": (2, 0)}  # of the better and the worse response
    for row in world.pairs("train"):
        fact = facts[row["prompt"][0]["content"]]
        better, worse = ("rejected", "chosen") if row["flipped"] else ("chosen", "rejected")
        assert world.classify(fact, row[better][0]["content"]) == "right"
        assert world.classify(fact, row[worse][0]["content"]) == classes[row["kind"]]
        assert (row[f"score_{better}"], row[f"score_{worse}"]) == scores[row["kind"]]
        judged["flipped" if row["flipped"] else "kept"] += 1
    assert judged == {"kept": 800, "flipped": 800}
    for row in world.dialogues("train"):
        if len(row["messages"]) == 2:
            question, answer = (message["content"] for message in row["messages"])
            assert world.classify(facts[question], answer) == classes[row["kind"]]


def test_what_is_said_besides_the_answer_is_garbled(world):
    for response in ("Ada's home town is Oslo", " Ada's home town is Oslo.", "Of course! Ada's home town is Oslo.", ""):
        assert world.classify(Fact("Ada", "home town", "Oslo"), response) == "garbled"


def test_right_probability_equals_a_naive_loop(folder, tokenizer):
    world, model = read_world(folder), AutoModelForCausalLM.from_pretrained(folder / "model").double()
    with torch.no_grad():
        # Weights that make some answers likely, so that the sum has terms of different size.
        for parameter in model.parameters():
            parameter.mul_(1.5)
    questions = world.held_out_questions[:5]
    expected = []
    for question in questions:
        prompt = tokenizer.apply_chat_template(question.prompt, add_generation_prompt=True, return_dict=False)
        answers = tokenizer(question.fact.answers, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logps = [padded_token_logps(model, [(prompt, [*ids, tokenizer.eos_token_id])])[0] for ids in answers]
        expected.append(sum(values.double().sum().exp().item() for values in logps))
    found = judge.right_probabilities(model, ChatFormat.probe(tokenizer), questions)
    assert min(expected) > 0 and len(set(expected)) == 5
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=0)


def test_evaluate(folder, tokenizer):
    world, model = read_world(folder), AutoModelForCausalLM.from_pretrained(folder / "model")
    world.held_out_questions = world.held_out_questions[:4]
    random_state = torch.get_rng_state()
    results = [judge.evaluate(model, tokenizer, world, samples_per_question=2, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(random_state, torch.get_rng_state())
    assert results[0] == results[1] and results[0]["samples"] != results[2]["samples"]
    assert results[0]["garbled"] == 1 and results[0]["right"] == 0  # an untrained model
    questions = [question.prompt[0]["content"] for question in world.held_out_questions]
    assert [entry["prompt"] for entry in results[0]["samples"]] == [text for text in questions for _ in range(2)]


def test_shorter_prompts_of_a_batch_are_answered_as_alone(folder, tokenizer):
    """With weights so large that attention is far from uniform, and every draw the likeliest token."""
    model, chat = AutoModelForCausalLM.from_pretrained(folder / "model"), ChatFormat.probe(tokenizer)
    for parameter in model.parameters():
        parameter.data *= 20 if parameter.ndim == 2 else 1
    model.model.norm.weight.data *= 1e4
    prompts = [chat.prompt_ids([user(text)]) for text in ("What is Ada's home town?", "Ada?")]
    assert len(prompts[0]) > len(prompts[1])
    together = judge.sample(model, chat, prompts, max_new_tokens=12, seed=0)
    alone = [judge.sample(model, chat, [prompt], max_new_tokens=12, seed=1)[0] for prompt in prompts]
    assert together == alone and len(set(together[1]["text"])) > 1


def test_a_model_that_knows_two_answers_is_judged_right(folder, tokenizer):
    """A few steps on two dialogues: its samples are the right answers, whose probabilities add up to nearly 1."""
    world, model = read_world(folder), AutoModelForCausalLM.from_pretrained(folder / "model")
    question = world.held_out_questions[0]
    dialogues = [[*question.prompt, assistant(question.fact.answers[n])] for n in (0, 1)]
    both = [torch.tensor([tokenizer.apply_chat_template(dialogue, return_dict=False)]) for dialogue in dialogues]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        sum(model(ids, labels=ids).loss for ids in both).backward()
        optimizer.step()
        optimizer.zero_grad()
    world.held_out_questions = [question]
    result = judge.evaluate(model, tokenizer, world, samples_per_question=8)
    assert result["right_probability"] > 0.95
    assert result["right"] > 0.8


def test_preference_metrics(folder, tokenizer):
    model, chat = AutoModelForCausalLM.from_pretrained(folder / "model"), ChatFormat.probe(tokenizer)
    dataset = load_pairs(DataConfig(dataset_name=str(folder / "pairs")), "test")
    limits = {"max_dropped_fraction": 0, "max_truncated_fraction": 0}
    pairs, _ = tokenize_pairs(dataset, chat, max_length=128, max_prompt_length=64, **limits)
    with torch.no_grad():
        scores = padded_pairs(model, list(pairs))
    margins = scores["chosen_logps"] / scores["chosen_lengths"] - scores["rejected_logps"] / scores["rejected_lengths"]
    metrics = judge.preference_metrics(model, pairs)
    assert len(margins) == 40 and 0 < metrics["preference_accuracy"] < 1
    assert metrics["preference_accuracy"] == (margins > 0).double().mean().item()
    assert metrics["preference_margin"] == pytest.approx(margins.mean().item(), abs=1e-5)


def test_same_config_same_files(folder, tmp_path):
    random.seed(7)
    torch.manual_seed(7)
    states = random.getstate(), torch.get_rng_state()
    assert write_world(tmp_path / "again", replace(SMALL, label_noise=0.15))
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])
    first = digests(folder)
    assert digests(tmp_path / "again") == first
    assert write_world(tmp_path / "other", replace(SMALL, seed=1))
    changed = [name for name, digest in digests(tmp_path / "other").items() if first[name] != digest]
    assert {"sft/train.jsonl", "pairs/test.jsonl", "questions.jsonl", "model/model.safetensors"} <= set(changed)


def test_a_world_is_kept_and_another_one_refused(folder, tmp_path):
    before = digests(folder)
    assert write_world(folder, replace(SMALL, label_noise=0.15)) is False
    with pytest.raises(ValueError, match="another world"):
        write_world(folder, replace(SMALL, seed=3))
    assert digests(folder) == before
    assert asdict(read_world(folder).config) == asdict(replace(SMALL, label_noise=0.15))
    knobs = yaml.safe_load(RECIPE.read_text()) | {"label_noise": 2}
    (tmp_path / "world.yaml").write_text(yaml.safe_dump(knobs))
    with pytest.raises(ValueError, match="label_noise"):
        load_world_config(tmp_path / "world.yaml")


def test_the_files_hold_the_world_a_tokenizer_and_a_model_that_fits_it(folder, tokenizer):
    right = [row["right"] for row in rows(folder / "questions.jsonl")]
    assert right == [question.fact.answers for question in read_world(folder).held_out_questions]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 32)
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    chat = ChatFormat.probe(tokenizer)
    bos, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert len({bos, end, pad}) == 3 and chat.end_id == end
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert chat.prior_context("header") == [bos, header]
    prompt = [user(" é x\n"), assistant("A"), user("B")]
    answers = [[assistant(text)] for text in ("It is Oslo.", "\n no ")]
    prompt_ids, *responses = chat.pair_ids(prompt, *answers)
    assert prompt_ids.count(bos) == 1 and prompt_ids[0] == bos and prompt_ids[-1] == header
    for answer, response in zip(answers, responses, strict=True):
        assert response[-1] == end and response.count(end) == 1
        assert tokenizer.apply_chat_template(prompt + answer, return_dict=False) == prompt_ids + response
        assert tokenizer.decode(response[:-1]) == answer[0]["content"]
