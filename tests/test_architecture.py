"""Imports go one way, and what the package never does."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rtpurbo

ROOT = Path(rtpurbo.__file__).parent
LEVELS = [
    {"config", "heads", "ops", "progress"},
    {"indexer", "cache", "families"},
    {"attention"},
    {"attach", "checkpoint", "models", "model_card"},
    {
        "data",
        "questions",
        "training",
        "calibration",
        "gates",
        "recovery",
        "indexer_training",
        "distillation",
        "generate",
        "evals",
    },
    {"pipeline", "memory", "report", "demo", "doctor", "export", "vllm_plugin"},
    {"cli"},
]
"""A module imports from its own level and those before it; names for type annotations alone do not count."""
LEVEL = {module: number for number, level in enumerate(LEVELS) for module in level}
FOUNDATION = {"config": set(), "progress": set(), "ops": set(), "heads": {"config"}}
"""What the lowest level may import of ours beyond itself."""


def sources() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_of(file: Path) -> str:
    """The module or subpackage directly under `rtpurbo` that a file belongs to; "" for the package itself."""
    first = file.relative_to(ROOT).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def at_run_time(tree: ast.AST, *, functions: bool) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:` and, unless asked for, inside of functions."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if functions or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from at_run_time(child, functions=functions)


def our_imports(file: Path, tree: ast.AST, *, functions: bool = True) -> set[str]:
    """Modules of ours that a file imports, by the same names as `module_of`."""
    package = ["rtpurbo", *file.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in at_run_time(tree, functions=functions):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module or "").split(".") if node.module else base
            paths = [base] if len(base) > 1 else [[*base, alias.name] for alias in node.names]
        else:
            continue
        found |= {path[1] for path in paths if path[0] == "rtpurbo" and len(path) > 1}
    return found - {"__version__"}


def graph(*, functions: bool = True) -> dict[str, set[str]]:
    edges: dict[str, set[str]] = {}
    for file in sources():
        module = module_of(file)
        if module:
            edges.setdefault(module, set()).update(
                our_imports(file, ast.parse(file.read_text()), functions=functions) - {module}
            )
    return edges


def test_every_module_has_its_place():
    homeless = {module_of(file) for file in sources()} - {""} - LEVEL.keys()
    assert not homeless, f"give {homeless} a place in LEVELS"


def test_imports_go_down():
    upward = [
        f"{module} imports {other}"
        for module, others in graph().items()
        for other in others
        if LEVEL.get(other, 0) > LEVEL.get(module, len(LEVELS))
    ]
    assert upward == []


def test_the_foundation_knows_nothing_of_ours():
    edges = graph()
    assert {module: edges[module] - allowed for module, allowed in FOUNDATION.items() if module in edges} == {
        module: set() for module in FOUNDATION if module in edges
    }


def test_no_circles_on_import():
    edges, done = graph(functions=False), set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*path, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def offences(tree: ast.AST) -> list[str]:
    """What a file does that the package never does, with line numbers."""
    found = []
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            if name.split(".")[0] in ("pickle", "cPickle", "dill", "joblib", "shelve", "marshal") or name == "torch.load":
                found.append(f"{node.lineno}: imports {name}")
        if isinstance(node, ast.Attribute) and node.attr == "load" and ast.unparse(node.value) in ("torch", "np", "numpy"):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
        if isinstance(node, ast.ExceptHandler):
            kinds = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in kinds:
                if kind is None or ast.unparse(kind) in ("Exception", "builtins.Exception"):
                    found.append(f"{node.lineno}: catches everything")
                elif ast.unparse(kind) == "BaseException" and not _raises_again(node):
                    found.append(f"{node.lineno}: catches BaseException and goes on")
    return found


def _raises_again(handler: ast.ExceptHandler) -> bool:
    last = handler.body[-1]
    return isinstance(last, ast.Raise) and last.exc is None


@pytest.mark.parametrize("file", sources(), ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_error_is_swallowed(file):
    assert offences(ast.parse(file.read_text())) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load('x')",
        "from torch import load",
        "import numpy as np\nnp.load('x')",
        "try:\n    pass\nexcept Exception:\n    pass",
        "try:\n    pass\nexcept (ValueError, Exception) as error:\n    raise",
        "try:\n    pass\nexcept:\n    pass",
        "try:\n    pass\nexcept BaseException:\n    pass",
    ],
)
def test_the_check_itself_finds_offences(code):
    assert offences(ast.parse(code))


def test_the_check_itself_lets_the_rest_pass():
    code = "import torch\nfrom safetensors.torch import load\ntry:\n    load(b'')\nexcept BaseException:\n    raise"
    assert offences(ast.parse(code)) == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from .config import x", {"config"}),
        ("from . import ops, heads", {"ops", "heads"}),
        ("from .ops.select import x", {"ops"}),
        ("import rtpurbo.cache", {"cache"}),
        ("from rtpurbo import attach", {"attach"}),
        ("from rtpurbo.attach import x", {"attach"}),
        ("def f():\n    from .models import x", {"models"}),
        ("if TYPE_CHECKING:\n    from .models import x\nfrom .ops import y", {"ops"}),
        ("import torch\nfrom torch import nn", set()),
    ],
)
def test_the_check_itself_sees_imports(code, found):
    assert our_imports(ROOT / "cache.py", ast.parse(code)) == found


def test_the_check_itself_tells_imports_inside_of_functions():
    tree = ast.parse("from .ops import x\ndef f():\n    from .models import y")
    assert our_imports(ROOT / "cache.py", tree, functions=False) == {"ops"}


def test_the_check_itself_sees_imports_from_subpackages():
    assert our_imports(ROOT / "evals" / "needle.py", ast.parse("from ..data import x\nfrom .fidelity import y")) == {
        "data",
        "evals",
    }
