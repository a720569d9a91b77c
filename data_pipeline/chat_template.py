"""Conversations to text by the chat template of a tokenizer, and which parts of the text the assistant says.

A part is exact by construction: it begins where the prompt ends that generation would see, and ends with the turn.
Where the template marks its parts (`{% generation %}`), its marks are used. Otherwise turn n is the text that
rendering messages [0, n] adds to rendering messages [0, n) with a generation prompt. A template that rewrites
earlier turns (drops their reasoning, say) has no such text; such a conversation becomes one text per assistant
turn, each with the loss on its last turn, which is what the model sees at that turn.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

CONFIG_NAME = "tokenizer_config.json"
TEMPLATE_NAME = "chat_template.jinja"
ASSISTANT = "assistant"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Characters of no script and no file: they mark the borders of what an assistant says while a text is rendered.
BEGIN, END = "\ue0f0", "\ue0f1"

Message = dict[str, Any]


class ChatError(ValueError):
    """A conversation that the template refuses or that is none."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text with the parts that are to be learnt."""

    text: str
    spans: tuple[tuple[int, int], ...]
    """Begin and end of each part in characters, in order, apart from each other."""


class _Generation(Extension):
    """The `{% generation %}` block of chat templates: its content between two marks."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Any) -> str:
        return f"{BEGIN}{caller()}{END}"


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **options: Any) -> str:
    """`tojson` without the HTML escapes of jinja2's own, as chat templates expect it."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii, **options)


class ChatTemplate:
    """A chat template, run in a sandbox; it sees messages, tools and the names of the special tokens."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`source` is Jinja; `special_tokens` gives `bos_token` and the like.

        Raises:
            ValueError: not a template, or it has no place for what a message says.
        """
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        # No clock: a template that can do without (`strftime_now is defined`) renders the same text every day.
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ValueError(
                f"the chat template does not parse ({error}): it is the Jinja text of 'chat_template' in "
                f"{CONFIG_NAME}; repair it"
            ) from error
        self.special_tokens = special_tokens
        self.has_marks = re.search(r"\{%-?\s*generation\b", source) is not None
        self._takes_parts = self._find_content_form()

    @classmethod
    def of_tokenizer(cls, directory: Path) -> "ChatTemplate":
        """The template of a tokenizer directory: `chat_template.jinja`, or `chat_template` in tokenizer_config.json.

        Raises:
            ValueError: there is none.
        """
        path = directory / CONFIG_NAME
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"'{path}' cannot be read ({error}): chat data needs the tokenizer's directory with tokenizer.json and "
                f"{CONFIG_NAME}; check --tokenizer"
            ) from error
        source = config.get("chat_template")
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
        if (directory / TEMPLATE_NAME).is_file():
            source = (directory / TEMPLATE_NAME).read_text(encoding="utf-8")
        if not isinstance(source, str):
            raise ValueError(
                f"'{path}' has no 'chat_template': chat data needs one; take it from the model's page, or write "
                f"{TEMPLATE_NAME} beside the file"
            )
        values = {name: config.get(name) for name in SPECIAL_TOKENS}
        names = {
            key: value["content"] if isinstance(value, dict) else value
            for key, value in values.items()
            if value
        }
        return cls(source, names)

    def _find_content_form(self) -> bool:
        """Whether the template wants what is said as a list of parts and not as a string."""
        for takes_parts in (False, True):
            self._takes_parts = takes_parts
            probes = [
                {"role": "user", "content": "probe-of-user"},
                {"role": ASSISTANT, "content": "probe-of-assistant"},
            ]
            try:
                text = self._text(probes, None, prompt=False)
            except ChatError:
                continue
            if "probe-of-user" in text and "probe-of-assistant" in text:
                return takes_parts
        raise ValueError(
            "the chat template shows no user and assistant turn, neither with content as a string nor as a list of "
            "{'type': 'text', 'text': ...}: it must show both; use the template of a chat model"
        )

    def _text(self, messages: Sequence[Message], tools: Any, prompt: bool) -> str:
        given = [dict(message) for message in messages]
        if self._takes_parts:
            for message in given:
                if isinstance(message.get("content"), str):
                    message["content"] = [{"type": "text", "text": message["content"]}]
        values = {"messages": given, "tools": tools, "add_generation_prompt": prompt, **self.special_tokens}
        try:
            return self._template.render(values)
        # A template is a program: what it does to a message it was not made for is any exception.
        except Exception as error:
            raise ChatError(f"the chat template refuses it: {error}") from error

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> str:
        """The text up to where the assistant is to speak.

        Raises:
            ChatError: the template refuses the conversation.
        """
        return self._text(messages, tools, prompt=True)

    def render(self, messages: Sequence[Message], tools: Any = None) -> list[Rendered]:
        """A conversation as texts to train on: one, or one per assistant turn where turns change later.

        Raises:
            ChatError: the template refuses the conversation, or the assistant says nothing in it.
        """
        if self.has_marks:
            rendered = [_without_marks(self._text(messages, tools, prompt=False))]
        else:
            rendered = self._by_turns(messages, tools)
        if not any(text.spans for text in rendered):
            raise ChatError("the assistant says nothing in it")
        return rendered

    def _by_turns(self, messages: Sequence[Message], tools: Any) -> list[Rendered]:
        turns: list[Rendered] = []
        for number, message in enumerate(messages):
            if message.get("role") != ASSISTANT:
                continue
            before = self._text(messages[:number], tools, prompt=True)
            upto = self._text(messages[: number + 1], tools, prompt=False)
            if not upto.startswith(before):
                raise ChatError(
                    f"its assistant turn does not begin with the template's generation prompt: message {number}"
                )
            turns.append(Rendered(upto, ((len(before), len(upto)),)))
        whole = self._text(messages, tools, prompt=False)
        if all(whole.startswith(turn.text) for turn in turns):
            return [Rendered(whole, tuple(span for turn in turns for span in turn.spans))]
        return turns


def _without_marks(text: str) -> Rendered:
    """The text without the marks of `{% generation %}`, and the parts that were between them."""
    pieces, spans, length = [], [], 0
    for number, piece in enumerate(re.split(f"[{BEGIN}{END}]", text)):
        if number % 2 and piece:
            spans.append((length, length + len(piece)))
        pieces.append(piece)
        length += len(piece)
    return Rendered("".join(pieces), tuple(spans))
