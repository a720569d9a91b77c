"""Chat data for supervised fine-tuning: JSONL conversations to a shard with the loss on what the assistant says.

Each line is an object with a list of messages (`role`, `content`, and what else the template reads) and perhaps
`tools`. A text is cut at the borders of the assistant's parts before it is encoded, so the tokens before a part
are those that generation sees. The name of a special token inside a message is text and cannot end a turn. White
space that the template puts behind a turn's last special token is not learnt: generation has ended there.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.atomic import only_process, writing_to
from data_pipeline.chat_shard import ChatShardWriter
from data_pipeline.chat_template import BEGIN, END, ChatError, ChatTemplate, Message, Rendered
from data_pipeline.documents import open_stream
from data_pipeline.parts import damaged, files_below
from data_pipeline.tokenize import load_tokenizer

# Put into the names of special tokens inside messages while the template runs; taken out before encoding.
BREAK = "\ue0f2"
RESERVED = (BEGIN, END, BREAK)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many bytes are done and how many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatSummary:
    """What was read, written and left out."""

    num_conversations: int
    """Conversations in the shard."""
    num_documents: int
    """Documents they became: more where the template rewrites earlier turns."""
    num_tokens: int
    """Tokens of all documents."""
    num_targets: int
    """Tokens that are learnt."""
    longest_tokens: int
    """Tokens of the longest document."""
    dropped: dict[str, int]
    """Lines left out, by reason."""


class ChatEncoder:
    """Conversations to token ids and targets, with one tokenizer directory."""

    def __init__(self, directory: Path) -> None:
        """`directory` holds tokenizer.json and tokenizer_config.json.

        Raises:
            ValueError: a file is missing or damaged.
        """
        self._template = ChatTemplate.of_tokenizer(directory)
        self._tokenizer = load_tokenizer(directory / "tokenizer.json")
        # What is left to encode between special tokens is plain text.
        self._tokenizer.encode_special_tokens = True
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        self._special_ids = {token.content: number for number, token in added.items() if token.special}
        # Longest first, as a name may begin with another; with none, a pattern that is never found.
        names = sorted(map(re.escape, self._special_ids), key=len, reverse=True)
        self._special_names = re.compile(f"({'|'.join(names)})" if names else "((?!))")

    def encode(self, messages: Sequence[Message], tools: Any = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per text: token ids, int32 [S], and whether each is to be learnt, bool [S].

        Raises:
            ChatError: the template refuses the conversation, or the assistant says nothing in it.
        """
        check_messages(messages)
        return [
            self._encode(rendered)
            for rendered in self._template.render(self._quoted(messages), self._quoted(tools))
        ]

    def encode_prompt(self, messages: Sequence[Message], tools: Any = None) -> np.ndarray:
        """Token ids, int32 [S], of a conversation up to where the assistant is to speak.

        Raises:
            ChatError: no conversation, or one that the template refuses.
        """
        check_messages(messages)
        text = self._template.prompt(self._quoted(messages), self._quoted(tools))
        return np.asarray(self._ids_of(text), np.int32)

    @property
    def end_id(self) -> int | None:
        """The token that ends a turn, by the tokenizer's `eos_token`; None where it names none."""
        name = self._template.special_tokens.get("eos_token")
        return self._special_ids.get(name) if name else None

    def _quoted(self, value: Any) -> Any:
        """The same messages with the names of special tokens broken up, and without characters that are ours."""
        if isinstance(value, str):
            for character in RESERVED:
                value = value.replace(character, "\ufffd")
            return self._special_names.sub(lambda match: match[0][0] + BREAK + match[0][1:], value)
        if isinstance(value, dict):
            return {key: self._quoted(part) for key, part in value.items()}
        return [self._quoted(part) for part in value] if isinstance(value, list) else value

    def _encode(self, rendered: Rendered) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        targets: list[bool] = []
        end = 0
        for start, stop in (*rendered.spans, (len(rendered.text), len(rendered.text))):
            before = self._ids_of(rendered.text[end:start])
            said = self._ids_of(rendered.text[start:stop])
            ids += before + said
            num_learnt = self._num_learnt(said)
            targets += [False] * len(before) + [True] * num_learnt + [False] * (len(said) - num_learnt)
            end = stop
        return np.asarray(ids, np.int32), np.asarray(targets, bool)

    def _ids_of(self, text: str) -> list[int]:
        """The ids of a piece of text: special tokens by name, the rest as plain text."""
        ids: list[int] = []
        for piece in self._special_names.split(text):
            number = self._special_ids.get(piece)
            if number is not None:
                ids.append(number)
            elif piece:
                plain = piece.replace(BREAK, "")
                ids += self._tokenizer.encode(plain, add_special_tokens=False).ids
        return ids

    def _num_learnt(self, ids: list[int]) -> int:
        """How many tokens of a turn are learnt: all, or up to its last special token if only space follows."""
        specials = set(self._special_ids.values())
        last = max((place for place, number in enumerate(ids) if number in specials), default=-1)
        tail = self._tokenizer.decode(ids[last + 1 :], skip_special_tokens=False)
        return last + 1 if last >= 0 and not tail.strip() else len(ids)


def check_messages(messages: Any) -> None:
    """Refuse what is no conversation.

    Raises:
        ChatError: not a list of objects with a role.
    """
    if not isinstance(messages, list) or not messages:
        raise ChatError("the messages are no list, or an empty one")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ChatError(f"a message has no role: number {number}")


def prepare_chat(
    inputs: Sequence[Path],
    prefix: Path,
    tokenizer_directory: Path,
    messages_field: str = "messages",
    progress: Progress | None = None,
) -> ChatSummary:
    """Encode JSONL conversations into one chat shard, in the order of the files and lines.

    Args:
        inputs: files, or directories of files; the field `messages_field` of a line holds its messages.
        prefix: PREFIX.bin, PREFIX.idx and PREFIX.loss are written.
        tokenizer_directory: holds tokenizer.json and tokenizer_config.json with the chat template.

    Raises:
        ReadError: a missing or damaged file.
        ValueError: the tokenizer cannot be used, no conversation is left, or the directory cannot be written.
    """
    encoder = ChatEncoder(tokenizer_directory)
    dropped: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    longest = 0
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with (
        writing_to(prefix.parent),
        only_process(Path(f"{prefix}.lock")),
        ChatShardWriter(prefix, encoder.vocab_size) as writer,
    ):
        for file in files_below(inputs):
            for position, record in conversations(file, messages_field):
                (progress or _silent)(file.name, position, file.stat().st_size)
                try:
                    encoded = encoder.encode(record[messages_field], record.get("tools"))
                except ChatError as error:
                    dropped[str(error).partition(":")[0]] += 1
                    continue
                counts["conversations"] += 1
                for tokens_S, is_target_S in encoded:
                    writer.add(tokens_S, is_target_S)
                    counts["tokens"] += len(tokens_S)
                    counts["targets"] += int(is_target_S.sum())
                    longest = max(longest, len(tokens_S))
        if not writer.num_documents:
            raise ValueError(
                f"inputs {[str(path) for path in inputs]} hold no conversation (left out: {dict(dropped)}): at least "
                "one line must have messages with an assistant's turn; check the files and the chat template"
            )
        num_documents = writer.num_documents
    return ChatSummary(
        num_conversations=counts["conversations"],
        num_documents=num_documents,
        num_tokens=counts["tokens"],
        num_targets=counts["targets"],
        longest_tokens=longest,
        dropped=dict(dropped),
    )


def _silent(what: str, done: int, total: int) -> None:
    """Reports to nobody."""


def conversations(file: Path, field: str) -> Iterator[tuple[int, dict]]:
    """Position of the line and its object, for each line of a JSONL file (also .gz, .zst).

    Raises:
        ReadError: a damaged file, or a line that is not an object with `field`.
    """
    position = 0
    try:
        with open_stream(file) as stream:
            while line := stream.readline():
                if line.strip():
                    record = json.loads(line.decode("utf-8"))
                    if not isinstance(record, dict) or field not in record:
                        raise ValueError(f"the line is no object with '{field}'")
                    yield position, record
                position += len(line)
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(file, position, error) from error
