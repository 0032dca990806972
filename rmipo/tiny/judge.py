"""What a model of the tiny setting answers: exact probabilities, samples, classes; and preference on any pairs."""

from collections import Counter

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from rmipo.data.chat import ChatFormat
from rmipo.tiny.world import CLASSES, Question, World, assistant
from rmipo.training import scoring
from rmipo.training.packing import pack

PROMPTS = 64  # sampled at a time
PAIRS = 16  # scored at a time


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    samples_per_question: int = 4,
    seed: int = 0,
) -> dict:
    """Ask `world.held_out_questions`.

    Returns:
        `right_probability`: mean over the questions of the exact total probability of all right answers;
        `right`, `boilerplate`, `wrong`, `garbled`: shares of the samples (see `World.classify`), which sum to 1;
        `samples`: `{"prompt", "response", "class"}` for every sample, drawn at temperature 1 from `seed`.
    """
    questions, chat = world.held_out_questions, ChatFormat.probe(tokenizer)
    # Exact, so it tells apart what samples of this number can't.
    probabilities = right_probabilities(model, chat, questions)
    asked = [question for question in questions for _ in range(samples_per_question)]
    prompts = [chat.prompt_ids(question.prompt) for question in asked]
    samples = []
    for question, response in zip(asked, sample(model, chat, prompts, max_new_tokens=64, seed=seed), strict=True):
        # What never ended can't be judged by what it would have said.
        found = world.classify(question.fact, response["text"]) if response["ended"] else "garbled"
        samples.append({"prompt": question.prompt[-1]["content"], "response": response["text"], "class": found})
    counts = Counter(entry["class"] for entry in samples)
    shares = {name: counts[name] / len(samples) for name in CLASSES}
    return {"right_probability": probabilities.mean().item(), **shares, "samples": samples}


def right_probabilities(model: PreTrainedModel, chat: ChatFormat, questions: list[Question]) -> torch.Tensor:
    """Total probability that the model gives to the right answers of each question, `(questions,)` float64.

    The right answers exclude each other, so their probabilities add up. Exact for the texts as the tokenizer writes
    them; the same text in other tokens counts as improbable.
    """
    groups = []
    for question in questions:
        encoded = [chat.pair_ids(question.prompt, *[assistant(answer)] * 2) for answer in question.fact.answers]
        # All answers of a question share its prompt, which is computed once.
        groups.append((encoded[0][0], [answer_ids for _, answer_ids, _ in encoded]))
    totals = []
    with scoring.Scorer(model) as scorer:
        for start in range(0, len(groups), PAIRS):
            batch = groups[start : start + PAIRS]
            totals.append(scorer.sums(pack(batch)).double().view(len(batch), -1).logsumexp(dim=1).exp())
    return torch.cat(totals)


@torch.no_grad()
def sample(
    model: PreTrainedModel, chat: ChatFormat, prompts: list[list[int]], max_new_tokens: int, seed: int
) -> list[dict]:
    """One response to each prompt (token ids) at temperature 1. The global random state is left as it was.

    Returns:
        Per prompt: `text`, without the end token; `ended`: False if it was cut at `max_new_tokens`.
    """
    pad_id = chat.tokenizer.pad_token_id
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": max_new_tokens}
    config = GenerationConfig(**options, eos_token_id=chat.end_id, pad_token_id=pad_id)
    responses = []
    model.eval()
    with torch.random.fork_rng():  # sampling amid a training must not change its dropout and order
        torch.manual_seed(seed)
        for start in range(0, len(prompts), PROMPTS):
            rows = [torch.tensor(prompt) for prompt in prompts[start : start + PROMPTS]]
            # Padded on the left: generation goes on at the right.
            ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
            mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
            output = model.generate(ids.to(model.device), config, attention_mask=mask.to(model.device))
            for tokens in output[:, ids.shape[1] :].tolist():
                ended = chat.end_id in tokens
                tokens = tokens[: tokens.index(chat.end_id)] if ended else tokens
                responses.append({"text": chat.tokenizer.decode(tokens), "ended": ended})
    return responses


def preference_metrics(model: PreTrainedModel, pairs: Dataset) -> dict[str, float]:
    """How the model ranks the two responses of each of `data.tokenize_pairs`' rows.

    Returns:
        `preference_accuracy`: share of pairs with A(chosen) > A(rejected), A being the mean log-probability per token;
        `preference_margin`: mean of A(chosen) - A(rejected), in nats per token.
    """
    rows = pairs.to_list()
    scores = scoring.score_pairs(model, (rows[start : start + PAIRS] for start in range(0, len(rows), PAIRS)))
    chosen = scores["chosen_logps"] / scores["chosen_lengths"]
    rejected = scores["rejected_logps"] / scores["rejected_lengths"]
    return {
        "preference_accuracy": (chosen > rejected).double().mean().item(),
        "preference_margin": (chosen - rejected).double().mean().item(),
    }
