"""Conversations out of the demo corpus: what a function of the standard library does, by its own docstring.

The answer is the first paragraph of the docstring, so it is short, true and written by people.
"""

import ast
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from data_pipeline.demo import Document

MAX_ANSWER_CHARACTERS = 300
MIN_ANSWER_CHARACTERS = 20
# Between turns stands the one special token that the demo's tokenizer has.
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_DESCRIBED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def demo_conversations(documents: Sequence[Document]) -> Iterator[dict[str, Any]]:
    """One conversation per described function and class, in the order of the documents: `{"messages": [...]}`."""
    for document in documents:
        place, _, path = document.name.partition(":")
        if place != "stdlib":
            continue
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for name, text in _described(document.text):
            yield {
                "messages": [
                    {"role": "user", "content": f"What does {module}.{name} do?"},
                    {"role": "assistant", "content": text},
                ]
            }


def _described(source: str) -> Iterator[tuple[str, str]]:
    """Qualified name and first paragraph of every docstring of a source file that is neither short nor long."""
    try:
        with warnings.catch_warnings():
            # old escapes in the sources of the standard library
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except SyntaxError:
        return
    waiting: list[tuple[str, ast.AST]] = [("", tree)]
    while waiting:
        prefix, node = waiting.pop(0)
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, _DESCRIBED):
                continue
            name = f"{prefix}{child.name}"
            paragraph = " ".join((ast.get_docstring(child) or "").split("\n\n")[0].split())
            if MIN_ANSWER_CHARACTERS <= len(paragraph) <= MAX_ANSWER_CHARACTERS:
                yield name, paragraph
            if isinstance(child, ast.ClassDef):
                waiting.append((f"{name}.", child))
