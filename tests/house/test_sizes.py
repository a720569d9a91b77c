"""The sizes of CONTRIBUTING.md: files at most 500 lines, functions at most 60 lines and 8 parameters."""

from __future__ import annotations

import ast

from tests.house.checkout import ROOT, files

# An operator's schema has a parameter per tensor; what stands for it in a test takes the same.
OPERATORS = ("kernels_cuda/", "tests/model/")
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 500, 60, 8


def too_big(path: str, source: str) -> list[str]:
    """One sentence per thing of a Python file that is over a limit."""
    found = []
    if len(source.splitlines()) > MAX_FILE_LINES:
        found.append(f"{path} has {len(source.splitlines())} lines")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        names = [
            argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        ]
        parameters = [name for name in names if name not in ("self", "cls")]
        if lines > MAX_FUNCTION_LINES:
            found.append(f"{path}: {node.name} has {lines} lines")
        if len(parameters) > MAX_PARAMETERS and not any(part in path for part in OPERATORS):
            found.append(f"{path}: {node.name} has {len(parameters)} parameters")
    return found


def test_files_and_functions_keep_their_size():
    sources = [file for file in files() if file.suffix == ".py"]
    found = [
        line for file in sources for line in too_big(str(file), (ROOT / file).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_a_long_file_a_long_function_and_many_parameters_are_found():
    body = "\n".join("    pass" for _ in range(MAX_FUNCTION_LINES))
    assert too_big("a.py", f"def f():\n{body}\n") == ["a.py: f has 61 lines"]
    assert too_big("a.py", "def f(a, b, c, d, e, f, *, g, h, i): ...") == ["a.py: f has 9 parameters"]
    assert too_big("a.py", "x = 1\n" * 501) == ["a.py has 501 lines"]
    assert not too_big("a.py", "def f(self, a, b, c, d, e, f, g, h): ...")
