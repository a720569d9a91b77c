"""Which package may import which: the floors of the tree as data, and the walk over imports that applies
them.

A rule is found in the syntax tree, so an import inside a function or behind TYPE_CHECKING counts as well.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

OURS = ("kernels_cuda", "parallel", "megatron_m1", "data_pipeline", "tests", "slurm", "setup")

# Longest prefix wins. Each floor names the packages of ours it may import besides itself.
FLOORS: dict[str, tuple[str, ...]] = {
    "kernels_cuda": (),
    "parallel": ("kernels_cuda",),
    "data_pipeline": (),
    "megatron_m1.model": ("parallel", "kernels_cuda"),
    "megatron_m1.training": ("megatron_m1.model", "parallel"),
    "megatron_m1.rl": ("megatron_m1.training", "megatron_m1.model", "parallel", "kernels_cuda"),
    "megatron_m1.longcontext": ("megatron_m1.training", "megatron_m1.model", "parallel", "kernels_cuda"),
    "megatron_m1.plan": ("megatron_m1.training", "megatron_m1.model", "parallel", "kernels_cuda"),
    # The batch script and the check of the nodes know no model.
    "megatron_m1.launch": ("parallel", "kernels_cuda", "megatron_m1.runfile", "megatron_m1.doctor"),
    "megatron_m1.interop": ("megatron_m1.training", "megatron_m1.model", "parallel", "kernels_cuda"),
    # An entry as well: the other two commands that run a model.
    "megatron_m1.serving": ("megatron_m1", "parallel", "kernels_cuda", "data_pipeline"),
    # The entry files: the only ones that meet data_pipeline.
    "megatron_m1": ("megatron_m1", "parallel", "kernels_cuda", "data_pipeline"),
}

# Outside packages that a floor must not see, whatever else it uses.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "kernels_cuda": ("torch.distributed", "megatron", "mlflow", "pydantic", "transformers"),
    "parallel": ("mlflow", "pydantic", "transformers"),
    "data_pipeline": ("torch", "megatron", "mlflow", "pydantic"),
}

# Where only these and the standard library are allowed; the benchmarks may import the peers they measure.
ONLY: dict[str, tuple[str, ...]] = {"kernels_cuda": ("torch",)}
PEERS_ALLOWED = "kernels_cuda.bench"

# A name that belongs to one file.
ONE_PLACE: dict[str, tuple[str, ...]] = {
    "parallel_state": ("parallel/groups.py",),
    "TransformerConfig": ("megatron_m1/model/mcore.py",),
}

# Environment variables are read in one file; setup.py and the kernel build read the build switch.
READS_ENVIRONMENT = ("parallel/launch.py", "setup.py", "kernels_cuda/build.py")


@dataclass(frozen=True)
class Fault:
    """One broken rule."""

    path: str
    line: int
    sentence: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.sentence}"


def faults_of(path: str, source: str) -> list[Fault]:
    """Every broken rule of one file; `path` is relative to the root, with forward slashes."""
    tree = ast.parse(source, filename=path)
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    found = [fault for rule in (_imports, _one_place, _environment) for fault in rule(path, module, tree)]
    return sorted(found, key=lambda fault: fault.line)


def source_files(root: Path) -> Iterator[tuple[str, str]]:
    """Relative path and text of every Python file of the four packages, slurm/ and setup.py."""
    for top in ("kernels_cuda", "parallel", "megatron_m1", "data_pipeline", "slurm"):
        for file in sorted((root / top).rglob("*.py")):
            yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")
    yield "setup.py", (root / "setup.py").read_text(encoding="utf-8")


def imported_names(module: str, tree: ast.AST, *, is_package: bool) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything a file imports, also by importlib with a constant name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + (1 if is_package else 0)
                base = ".".join([*parts[:keep], *([base] if base else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            names = [argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant)]
            yield from ((node.lineno, str(name)) for name in names)


def _imports(path: str, module: str, tree: ast.AST) -> Iterator[Fault]:
    floor = _longest(module, FLOORS)
    for line, name in imported_names(module, tree, is_package=path.endswith("/__init__.py")):
        if name.split(".")[0] in OURS:
            allowed = (floor, *FLOORS[floor]) if floor else ()
            if not any(_within(name, package) for package in allowed):
                yield Fault(
                    path,
                    line,
                    f"imports {name}, but {floor or 'this file'} may import only {allowed} of ours",
                )
        for forbidden in FORBIDDEN.get(floor or "", ()):
            if _within(name, forbidden):
                yield Fault(path, line, f"imports {name}, which {floor} must not know")
        outside = name.split(".")[0] not in (*OURS, *sys.stdlib_module_names, *ONLY.get(floor or "", ()))
        if floor in ONLY and outside and not _within(module, PEERS_ALLOWED):
            yield Fault(path, line, f"imports {name}, but {floor} may import only {ONLY[floor]} from outside")


def _one_place(path: str, module: str, tree: ast.AST) -> Iterator[Fault]:
    for node in ast.walk(tree):
        names = {getattr(node, "id", None), getattr(node, "attr", None)}
        if isinstance(node, ast.ImportFrom):
            names = {alias.name for alias in node.names} | set((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            names = {part for alias in node.names for part in alias.name.split(".")}
        for name in names & ONE_PLACE.keys():
            if path not in ONE_PLACE[name]:
                yield Fault(path, node.lineno, f"names {name}, which belongs to {ONE_PLACE[name][0]}")


def _environment(path: str, module: str, tree: ast.AST) -> Iterator[Fault]:
    if path in READS_ENVIRONMENT:
        return
    writes = {id(target.value) for target in ast.walk(tree) if _is_write(target)}
    for node in ast.walk(tree):
        attribute = isinstance(node, ast.Attribute) and node.attr in ("environ", "environb", "getenv")
        imported = isinstance(node, ast.ImportFrom) and node.module == "os"
        named = imported and {alias.name for alias in node.names} & {"environ", "environb", "getenv"}
        if (attribute and id(node) not in writes) or named:
            yield Fault(path, node.lineno, f"reads the environment, which only {READS_ENVIRONMENT[0]} does")


def _is_write(node: ast.AST) -> bool:
    """`os.environ[...] = value`, `del os.environ[...]`, and the methods of os.environ that only set."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.ctx, ast.Store | ast.Del)
    return isinstance(node, ast.Attribute) and node.attr in ("setdefault", "update")


def _called(node: ast.Call) -> str | None:
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _longest(module: str, table: dict[str, tuple[str, ...]]) -> str | None:
    matches = [prefix for prefix in table if _within(module, prefix)]
    return max(matches, key=len, default=None)
