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
        in_front: what the tokenizer, and not the template, writes in front of a prompt: BOS or nothing.
        added: text that the template itself writes at the start of a response, which is scored with it.
    """

    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    bos_id: int | None
    end_id: int
    header_ids: tuple[int, ...]
    in_front: tuple[int, ...]
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
        if tokenizer.chat_template is None:
            raise DataError("the tokenizer has no chat template. Set `chat_template` in the recipe")
        # Rendered rather than parsed: a template is a program, and only its output says what it does.
        bare, prompt = (render(tokenizer, PROBES[1], header) for header in (False, True))
        full = render(tokenizer, [*PROBES[1], ANSWER], False)
        if not (prompt.startswith(bare) and full.startswith(prompt)):
            raise DataError(
                f"the chat template's prompt is not a prefix of the full text: {bare!r} has to start {prompt!r}, and that "
                f"{full!r}: write as generation prompt what stands in front of an assistant message"
            )
        added, _, tail = full[len(prompt) :].partition(ANSWER["content"])
        # Also those such as <|eot_id|> that have no role in the tokenizer; the longest counts.
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        end_token = max((token for token in special if tail.lstrip().startswith(token)), key=len, default=None)
        after_end = tail.partition(end_token)[2] if end_token else tail
        if end_token is None or after_end.strip():
            raise DataError(
                f"no end token: after a response the chat template writes {tail!r}, expected one special token; write "
                "{{ eos_token }} after assistant messages"
            )
        # In context, as tokens may depend on what stands before them, but where one spans the boundary.
        prompt_ids, bare_ids = tokenize(tokenizer, prompt), tokenize(tokenizer, bare)
        header_ids = prompt_ids[len(bare_ids) :]
        if prompt_ids[: len(bare_ids)] != bare_ids:
            header_ids = tokenize(tokenizer, prompt.removeprefix(bare))
        bos_id = tokenizer.bos_token_id
        writes_bos = prompt_ids[:1] == [bos_id]
        # ChatML tokenizers name their turn marker <|im_start|> as BOS; others a token that they don't start texts with.
        if bos_id in header_ids or not (writes_bos or tokenizer("a")["input_ids"][0] == bos_id):
            bos_id = None
        return cls(
            tokenizer=tokenizer,
            bos_id=bos_id,
            end_id=tokenizer.convert_tokens_to_ids(end_token),
            header_ids=() if header_in_response else tuple(header_ids),
            # Templates that write BOS themselves would otherwise give two.
            in_front=() if bos_id is None or writes_bos else (bos_id,),
            header_in_response=header_in_response,
            after_end=after_end,
            added=added.strip(),
        )

    def prompt_ids(self, messages: Messages) -> list[int]:
        """Token ids of a prompt as generation continues it: one BOS, where the family has one, to the header."""
        return self._encode(render(self.tokenizer, messages, not self.header_in_response))

    def pair_ids(self, prompt: Messages, chosen: Messages, rejected: Messages) -> TokenPair:
        """Token ids of a prompt and of its two responses (one assistant message each), which end with the end token.

        Raises DataError if the template refuses the messages, does not keep the prompt as the full text's prefix, or
        leaves out or changes what the messages say.
        """
        prompt_text = render(self.tokenizer, prompt, not self.header_in_response)
        # Templates may leave the reasoning out of earlier answers, as generation sees them.
        require_contents([message for message in prompt if message["role"] != "assistant"], prompt_text)
        prompt_ids = self._encode(prompt_text)
        responses = []
        for response in (chosen, rejected):
            full = render(self.tokenizer, prompt + response, False)
            if not full.startswith(prompt_text):
                raise DataError("the chat template changes the prompt when a response follows")
            # Some templates write a newline after the end token; generation stops before it, so it is not trained.
            text = full[len(prompt_text) :].removesuffix(self.after_end)
            require_contents(response, text)
            # Prompt and response as one text, because generation continues the prompt's own tokens.
            ids = self._encode(prompt_text + text)
            if ids[: len(prompt_ids)] == prompt_ids:
                responses.append(ids[len(prompt_ids) :])
            else:
                # A token spans the end of the prompt. Generation starts after the prompt's own tokens, so the response is
                # tokenised apart; behind a special token, so that no space is added as at the start of a text.
                end_token = self.tokenizer.convert_ids_to_tokens(self.end_id)
                responses.append(tokenize(self.tokenizer, end_token + text)[1:])
        return prompt_ids, *responses

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
        bos = [] if self.bos_id is None else [self.bos_id]
        if kind == "bos" and not bos:
            raise DataError("prior_context: bos is empty, as this tokenizer has no BOS token. Set another one")
        # Plain text of a model without BOS has neither; its documents follow an end token.
        return {"none": [], "bos": bos, "header": [*bos, *self.header_ids] or [self.end_id]}[kind]

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token. A character that several tokens share is the last one's; the others are empty."""
        texts, start = [], 0
        for end in range(1, len(ids) + 1):
            # After the token before, as some tokenizers drop the space at the start of a text. A character has up to 4 bytes.
            before = self.tokenizer.decode(ids[max(0, start - 1) : start])
            text = self.tokenizer.decode(ids[max(0, start - 1) : end]).removeprefix(before)
            whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end - start >= 4 or end == len(ids)
            texts.append(text if whole else "")
            start = end if whole else start
        return texts

    def _encode(self, text: str) -> list[int]:
        return [*self.in_front, *tokenize(self.tokenizer, text)]


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


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"]
