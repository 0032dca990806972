"""What a tokenizer's chat template does, probed once: where prompts end, what starts and ends a response."""

import datetime
import json
import re
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rmipo.errors import UserError

Messages = list[dict[str, str]]
TokenPair = tuple[list[int], list[int], list[int]]  # ids of prompt, chosen, rejected

QUESTION = {"role": "user", "content": "What is two plus two?"}
ANSWER = {"role": "assistant", "content": "It is four."}
CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>["'])(?P<format>[^"']*)(?P=quote)\s*\)""")
BYTES = 4  # of a character at most
PROBES = ([QUESTION], [QUESTION, ANSWER, QUESTION])


class DataError(UserError, ValueError):
    """Data or a chat template that can't be trained on; the message says what was found and what to change."""


@dataclass(frozen=True)
class ChatFormat:
    """Renders and tokenises dialogues exactly as training and generation see them. Made by `probe`.

    Attributes:
        bos_id: the one BOS token in front of every prompt; None where the model family has none.
        end_id: the token that ends every response.
        header_ids: what the template writes between a prompt and its response, such as the assistant header; empty for
            Mistral, and where the header is scored with the response.
        added: text that the template itself writes at the start of a response, which is scored with it.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    bos_id: int | None
    end_id: int
    header_ids: tuple[int, ...]
    template_writes_bos: bool
    header_in_response: bool
    after_end: str
    added: str

    @classmethod
    def probe(cls, tokenizer: PreTrainedTokenizerBase, header_in_response: bool = False) -> "ChatFormat":
        """Find out what `tokenizer.chat_template` does.

        Args:
            header_in_response: render prompts without the generation prompt, so that the assistant header is scored as
                part of the response, as the authors' released code does for Llama-3 and Zephyr.

        Raises DataError if the tokenizer and its template can't be trained with.
        """
        try:
            return cls(
                tokenizer=tokenizer, header_in_response=header_in_response, **_probed(tokenizer, header_in_response)
            )
        except DataError as error:
            raise DataError(f"{tokenizer.name_or_path or type(tokenizer).__name__}: {error}") from error

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids of a prompt as generation continues it: one BOS, where the family has one, to the header."""
        return self._encode_prompts([render(self.tokenizer, messages, not self.header_in_response)])[0]

    def pair_ids(self, prompt: Messages, chosen: Messages, rejected: Messages) -> TokenPair:
        """Token ids of a prompt and of its two responses (one assistant message each), which end with the end token."""
        return self.encode([self.render_pair(prompt, chosen, rejected)])[0]

    def set_end_of_turn(self, generation_config: GenerationConfig) -> None:
        """Make generation stop at the token that ends a response, beside those where it already stops."""
        known = generation_config.eos_token_id
        known = [] if known is None else known if isinstance(known, list) else [known]
        generation_config.eos_token_id = [*known, *({self.end_id} - set(known))]

    def prior_context(self, kind: str) -> list[int]:
        """Token ids in front of a response when log pi(y) is scored.

        Args:
            kind: "header" (BOS and the generation header), "bos", or "none" (the response's own first token is the
                context: the authors' released code).
        """
        if kind == "none":
            return []
        bos = [] if self.bos_id is None else [self.bos_id]
        context = {"bos": bos, "header": [*bos, *self.header_ids]}[kind]
        if kind == "header" and not context:  # plain text of a model without BOS, whose documents follow an end token
            context = [self.end_id]
        if not context:
            raise DataError(f"prior_context: {kind} is empty, as this tokenizer has no BOS token. Set another one")
        return context

    def render_pair(self, prompt: Messages, chosen: Messages, rejected: Messages) -> tuple[str, str, str]:
        """Text of the prompt and what the full rendering of each response adds after it, through the end token.

        Raises DataError if the template refuses the messages, does not keep the prompt as the full text's prefix, or
        leaves out or changes what the messages say.
        """
        prompt_text = render(self.tokenizer, prompt, not self.header_in_response)
        responses = []
        for response in (chosen, rejected):
            full = render(self.tokenizer, prompt + response, False)
            if not full.startswith(prompt_text):
                raise DataError("the chat template changes the prompt when a response follows")
            # Some templates write a newline after the end token; generation stops before it, so it is not trained.
            responses.append(full[len(prompt_text) :].removesuffix(self.after_end))
            require_contents(response, responses[-1])
        # Templates may leave the reasoning out of earlier answers, as generation sees them.
        require_contents([message for message in prompt if message["role"] != "assistant"], prompt_text)
        return prompt_text, *responses

    def alters(self, prompt: Messages, chosen: Messages, rejected: Messages, rendered: tuple[str, str, str]) -> bool:
        """Whether the template leaves out part of an earlier answer, or adds more to a response than to the probes' one."""
        prompt_text, *responses = rendered
        # Templates of reasoning models leave earlier thoughts out, as generation will see them: reported, not refused.
        if any(turn["role"] == "assistant" and turn["content"].strip() not in prompt_text for turn in prompt):
            return True
        if self.header_in_response:  # there is no telling it from what else the template adds
            return False
        end = self.tokenizer.convert_ids_to_tokens(self.end_id)
        for (message,), text in zip((chosen, rejected), responses, strict=True):
            around = text.replace(message["content"].strip(), "", 1).removesuffix(end).strip()
            if around != self.added:
                return True
        return False

    def encode(self, rendered: list[tuple[str, str, str]]) -> list[TokenPair]:
        """Tokenise what `render_pair` returned, many pairs at a time."""
        prompts = self._encode_prompts([prompt for prompt, _, _ in rendered])
        chosen = self._encode_responses(prompts, [(prompt, response) for prompt, response, _ in rendered])
        rejected = self._encode_responses(prompts, [(prompt, response) for prompt, _, response in rendered])
        return list(zip(prompts, chosen, rejected, strict=True))

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token. A character that several tokens share is the last one's; the others are empty."""
        texts, start = [], 0
        for end in range(1, len(ids) + 1):
            # After the token before, as some tokenizers drop the space at the start of a text.
            before = self.tokenizer.decode(ids[max(0, start - 1) : start])
            text = self.tokenizer.decode(ids[max(0, start - 1) : end]).removeprefix(before)
            whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - start >= BYTES or end == len(ids)
            texts.append(text if whole else "")
            start = end if whole else start
        return texts

    def _encode_prompts(self, texts: list[str]) -> list[list[int]]:
        # Templates that write BOS themselves would otherwise give two.
        bos = [] if self.template_writes_bos or self.bos_id is None else [self.bos_id]
        return [bos + ids for ids in tokenize(self.tokenizer, texts)]

    def _encode_responses(self, prompts: list[list[int]], texts: list[tuple[str, str]]) -> list[list[int]]:
        # Prompt and response as one text, because generation continues the prompt's own tokens.
        fulls = self._encode_prompts([prompt + response for prompt, response in texts])
        responses = [full[len(prompt) :] for prompt, full in zip(prompts, fulls, strict=True)]
        merged = [i for i, full in enumerate(fulls) if full[: len(prompts[i])] != prompts[i]]
        if merged:
            # A token spans the end of the prompt. Generation starts after the prompt's own tokens, so the response is
            # tokenised apart from it; behind a special token, so that no space is added as at the start of a text.
            end_token = self.tokenizer.convert_ids_to_tokens(self.end_id)
            apart = tokenize(self.tokenizer, [end_token + texts[i][1] for i in merged])
            for i, ids in zip(merged, apart, strict=True):
                responses[i] = ids[1:]
        return responses


def freeze_date(tokenizer: PreTrainedTokenizerBase, date: datetime.date) -> bool:
    """Put `date` in place of the clock that the chat template reads; whether it reads one.

    Raises DataError if the date's format is not written out in the template.
    """
    template = tokenizer.chat_template or ""
    frozen = CLOCK.sub(lambda call: json.dumps(date.strftime(call["format"])), template)
    frozen = frozen.replace("strftime_now is defined", "true")
    if "strftime_now" in frozen:
        raise DataError("the chat template reads the clock (strftime_now) in a format that isn't written out in it")
    tokenizer.chat_template = frozen or None
    return frozen != template


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses: {error}") from error


def require_contents(messages: Messages, text: str) -> None:
    """Raises DataError unless `text`, which a template rendered, has in it what each of the messages says."""
    for message in messages:
        if message["content"].strip() not in text:
            raise DataError(f"the chat template leaves out or changes part of what the {message['role']} says")


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _probed(tokenizer: PreTrainedTokenizerBase, header_in_response: bool) -> dict:
    """The fields of a `ChatFormat` that its probe finds out."""
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template. Set `chat_template` in the recipe")
    # Rendered rather than parsed: a template is a program, and only its output says what it does.
    prompts = [render(tokenizer, messages, True) for messages in PROBES]
    bare = [render(tokenizer, messages, False) for messages in PROBES]
    fulls = [render(tokenizer, [*messages, ANSWER], False) for messages in PROBES]
    for messages, prompt, without_header, full in zip(PROBES, prompts, bare, fulls, strict=True):
        if not prompt.startswith(without_header):
            raise DataError(
                f"add_generation_prompt changes the dialogue itself: {without_header!r} does not start {prompt!r}"
            )
        if not full.startswith(prompt):
            raise DataError(
                f"the prompt is not a prefix of the full text: {prompt!r} does not start {full!r}; change the template so "
                "that its generation prompt is what it writes in front of an assistant message"
            )
        if any(full.count(turn["content"]) > [*messages, ANSWER].count(turn) for turn in (QUESTION, ANSWER)):
            raise DataError(f"the template writes a turn more than once: {full!r}; write its content once")

    tail = fulls[0].rpartition(ANSWER["content"])[2]  # the whole text if the answer is not in it
    # Also those such as <|eot_id|> that have no role in the tokenizer; the longest first.
    special = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    end_token = next((token for token in special if tail.lstrip().startswith(token)), None)
    if end_token is None:
        raise DataError(
            f"no end token: after a response the template writes {tail!r}, which does not start with a special token; "
            "write {{ eos_token }} after assistant messages"
        )
    after_end = tail.partition(end_token)[2]
    if after_end.strip():
        raise DataError(f"after a response the template writes {tail!r}: end it with one {end_token} and nothing more")

    # In context, as tokens may depend on what stands before them, but where one spans the boundary.
    prompt_ids, bare_ids = tokenize(tokenizer, [prompts[0], bare[0]])
    header_ids = prompt_ids[len(bare_ids) :]
    if prompt_ids[: len(bare_ids)] != bare_ids:
        header_ids = tokenize(tokenizer, [prompts[0].removeprefix(bare[0])])[0]

    bos_id = tokenizer.bos_token_id
    template_writes_bos = bos_id is not None and prompt_ids[:1] == [bos_id]
    if bos_id in header_ids:  # ChatML tokenizers name their turn marker <|im_start|> as BOS
        bos_id, template_writes_bos = None, False
    elif template_writes_bos and prompt_ids[1:2] == [bos_id]:
        raise DataError(f"double BOS: the template starts a prompt with {tokenizer.bos_token} twice; write it once")
    elif bos_id is not None and not template_writes_bos and tokenizer("a")["input_ids"][0] != bos_id:
        if bos_id != tokenizer.eos_token_id:
            raise DataError(
                f"no BOS: neither the template nor the tokenizer writes {tokenizer.bos_token}; start the template with "
                "{{ bos_token }}, or set the tokenizer's bos_token to null if the model was trained without"
            )
        bos_id = None  # one token for the ends of documents, not a start that the model expects
    return {
        "bos_id": bos_id,
        "end_id": tokenizer.convert_tokens_to_ids(end_token),
        "header_ids": () if header_in_response else tuple(header_ids),
        "template_writes_bos": template_writes_bos,
        "after_end": after_end,
        "added": fulls[0].removeprefix(prompts[0]).partition(ANSWER["content"])[0].strip(),
    }
