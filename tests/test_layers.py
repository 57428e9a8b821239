"""Imports point one way, and the API process loads no torch: read from the source, nothing is imported.

    errors, config, heap, logs, request, info <- text, models, tasks <- backends <- parallel <- engine, cli <- llm
        <- worker, training, evaluation, bench, export, check <- server

    server: http, engine_settings, settings <- served_models, response_store <- ops.metrics <- generation <- services
        <- openai, ops <- app <- cli

An import at module level or in a class body is *eager*: it runs when the module is imported. One in a function is lazy,
one under `if TYPE_CHECKING:` never runs. Direction binds all three; what a process loads follows the eager ones.
"""

import ast
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cllm_core", "server")

LAYERS = (
    (
        "cllm_core.errors",
        "cllm_core.config",
        "cllm_core.heap",
        "cllm_core.logs",
        "cllm_core.request",
        "cllm_core.info",
    ),
    ("cllm_core.text", "cllm_core.models", "cllm_core.tasks"),
    ("cllm_core.backends",),
    ("cllm_core.parallel",),
    ("cllm_core.engine", "cllm_core.cli"),
    ("cllm_core.llm",),
    (
        "cllm_core.worker",
        "cllm_core.training",
        "cllm_core.evaluation",
        "cllm_core.bench",
        "cllm_core.export",
        "cllm_core.check",
    ),
    ("server.http", "server.engine_settings", "server.settings"),
    ("server.served_models", "server.response_store"),
    (
        "server.ops.metrics",
        "server.ops.engine_metrics",
        "server.ops.vllm_names",
        "server.ops.tracing",
        "server.ops.engine_log",
    ),
    ("server.generation",),
    ("server.services",),
    ("server.openai", "server.ops", "server.playground"),  # endpoints
    ("server.app",),
    ("server",),  # server.cli, on top of all
)
# The package itself re-exports names of every layer below the server, so none of those may import it.
FACADE, FACADE_BESIDE = "cllm_core", "cllm_core.worker"

HEAVY = ("torch", "transformers", "accelerate", "peft", "safetensors")
TORCH_FREE = (
    "cllm_core.cli",
    "cllm_core.config",
    "cllm_core.errors",
    "cllm_core.heap",
    "cllm_core.info",
    "cllm_core.logs",
    "cllm_core.request",
    "cllm_core.text",
    "cllm_core.tasks",
    "cllm_core.engine.block_pool",
    "cllm_core.engine.constraint",
    "cllm_core.engine.draft_length",
    "cllm_core.engine.plan",
    "cllm_core.engine.request_state",
    "cllm_core.engine.scheduler",
    "cllm_core.worker",
    "server",
)

When = Literal["eager", "lazy", "typing"]


@dataclass(frozen=True)
class Import:
    """One import statement: `importer` names `target`, a module of the project or of another package."""

    importer: str
    target: str
    line: int
    when: When

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target} ({self.when})"


def read_imports(root: Path) -> dict[str, list[Import]]:
    """Imports of every module of the project below `root`, by module name."""
    sources = {_module_name(path.relative_to(root)): path for name in PACKAGES for path in (root / name).rglob("*.py")}
    return {
        module: [
            Import(module, target, node.lineno, when)
            for node, when in _import_nodes(ast.parse(path.read_text(encoding="utf-8")), "eager")
            for target in _targets(
                node, module if path.name == "__init__.py" else module.rpartition(".")[0], sources.keys()
            )
        ]
        for module, path in sources.items()
    }


def upward_imports(imports: dict[str, list[Import]]) -> list[Import]:
    """Imports of a higher layer by a lower one."""
    return [
        found
        for module, all_found in imports.items()
        for found in all_found
        if found.target in imports and _rank(found.target) > _rank(module)
    ]


def heavy_chains(imports: dict[str, list[Import]], start: str) -> list[list[Import]]:
    """Chains of eager imports from `start` to a heavy package, the shortest to each module on the way."""
    chains, seen, queue = [], {start}, [(start, list[Import]())]
    for module, chain in queue:  # grows while it is read: breadth first
        for found in imports[module]:
            if found.when != "eager":
                continue
            if _within(found.target, HEAVY):
                chains.append([*chain, found])
            for loaded in _loaded_by(found.target, imports.keys()):
                if loaded not in seen:
                    seen.add(loaded)
                    queue.append((loaded, [*chain, found]))
    return chains


def _import_nodes(node: ast.AST, when: When) -> Iterator[tuple[ast.Import | ast.ImportFrom, When]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, when
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _import_nodes(child, "lazy")
        elif isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _import_nodes(ast.Module(child.body, []), "typing")
            yield from _import_nodes(ast.Module(child.orelse, []), when)
        else:
            yield from _import_nodes(child, when)


def _targets(node: ast.Import | ast.ImportFrom, package: str, modules: Collection[str]) -> Iterator[str]:
    """What a module of this package imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
    source = ".".join([*base, *([node.module] if node.module else [])])
    for alias in node.names:
        submodule = f"{source}.{alias.name}"
        yield submodule if submodule in modules else source


def _loaded_by(target: str, modules: Collection[str]) -> list[str]:
    """`target` and the packages around it, each of which Python executes on import."""
    parts = target.split(".")
    return [name for end in range(1, len(parts) + 1) if (name := ".".join(parts[:end])) in modules]


def _rank(module: str) -> int:
    place = FACADE_BESIDE if module == FACADE else module
    ranks = [rank for rank, layer in enumerate(LAYERS) if _within(place, layer)]
    assert ranks, f"{module} belongs to no layer: give it a place in LAYERS"
    return ranks[0]


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _write_tree(root: Path, sources: dict[str, str]) -> dict[str, list[Import]]:
    for name, source in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return read_imports(root)


@pytest.fixture(scope="module")
def imports() -> dict[str, list[Import]]:
    return read_imports(ROOT)


def test_the_server_names_no_module_of_its_own_absolutely() -> None:
    """Installed, the package is called cllm_server: a name as general as `server` may be another's."""
    named = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "server").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.ImportFrom) and not node.level and str(node.module).split(".")[0] == "server")
        or (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "server" for alias in node.names))
    ]
    assert named == []


def test_no_layer_imports_one_above_it(imports: dict[str, list[Import]]) -> None:
    assert [str(found) for found in upward_imports(imports)] == []


@pytest.mark.parametrize("package", TORCH_FREE)
def test_torch_free_modules_load_no_torch_on_any_path(imports: dict[str, list[Import]], package: str) -> None:
    modules = [module for module in imports if _within(module, (package,))]
    assert modules, f"{package} is gone: update TORCH_FREE"
    chains = [chain for module in modules for chain in heavy_chains(imports, module)]
    assert [" -> ".join(map(str, chain)) for chain in chains] == []


@pytest.mark.parametrize("package", TORCH_FREE)
def test_torch_free_modules_do_not_name_torch_even_in_functions(imports: dict[str, list[Import]], package: str) -> None:
    named = [found for module in imports if _within(module, (package,)) for found in imports[module]]
    assert [str(found) for found in named if found.when == "lazy" and _within(found.target, HEAVY)] == []


def test_checker_finds_upward_imports_of_every_kind(tmp_path: Path) -> None:
    imports = _write_tree(
        tmp_path,
        {
            "server/__init__.py": "from cllm_core.engine import loop\n",
            "cllm_core/errors.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import cllm_core.models\n",
            "cllm_core/models/__init__.py": "import cllm_core.engine.loop as loop\n",
            "cllm_core/engine/loop.py": "def run():\n    from server import app\n",
        },
    )
    assert sorted(map(str, upward_imports(imports))) == [
        "cllm_core.engine.loop:2 imports server (lazy)",
        "cllm_core.errors:3 imports cllm_core.models (typing)",
        "cllm_core.models:1 imports cllm_core.engine.loop (eager)",
    ]


def test_checker_follows_eager_imports_through_packages_to_torch(tmp_path: Path) -> None:
    imports = _write_tree(
        tmp_path,
        {
            "server/app.py": "from cllm_core.text.stop import find\n",
            "cllm_core/text/__init__.py": "from cllm_core.text import tensors\n",
            "cllm_core/text/stop.py": "def find():\n    import torch\n",
            "cllm_core/text/tensors.py": "class Late:\n    import torch.nn\n",
        },
    )
    assert [" -> ".join(map(str, chain)) for chain in heavy_chains(imports, "server.app")] == [
        "server.app:1 imports cllm_core.text.stop (eager)"
        " -> cllm_core.text:1 imports cllm_core.text.tensors (eager)"
        " -> cllm_core.text.tensors:2 imports torch.nn (eager)"
    ]


def test_checker_refuses_a_module_without_a_layer(tmp_path: Path) -> None:
    imports = _write_tree(tmp_path, {"cllm_core/stray.py": "import cllm_core.errors\n", "cllm_core/errors.py": ""})
    with pytest.raises(AssertionError, match=r"cllm_core\.stray belongs to no layer"):
        upward_imports(imports)
