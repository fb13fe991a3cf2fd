"""Who may import whom; read from the sources, so a module counts even if no test imports it."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmconvert

ROOT = Path(__file__).resolve().parent.parent

MAY_IMPORT = {
    "errors": set(),
    "terminal": set(),
    "checkpoint": {"errors"},
    "tensors": {"errors", "checkpoint"},
    "canonical": {"errors", "checkpoint", "tensors"},
    "spec": {"errors", "terminal", "checkpoint", "tensors", "canonical", "specs"},  # it loads `specs`, by name
    "specs": {"errors", "canonical", "spec"},
    "engine": {"errors", "checkpoint", "tensors"},
    "infer": {"errors", "terminal", "checkpoint", "engine", "models"},
    "training": {"errors", "checkpoint"},
    # A proof must not share the code it judges: no spec, no specs, no canonical, no converters.
    "models": {"errors"},
    "verify": {"errors", "terminal", "checkpoint", "tensors", "engine", "models"},
    "debug": {"errors", "terminal", "checkpoint", "models", "verify"},
    "converters": {"errors", "checkpoint", "tensors", "canonical", "spec", "specs", "engine", "verify"},
}
HEAVY = {"torch", "transformers", "accelerate"}
# These are imported from a training script, by name; the command line never needs them.
FOR_TRAINING = {f"llmconvert.training.{name}" for name in ("channel_loss", "megatron", "trainer")}
THIRD_PARTY = {
    "errors": set(),
    "checkpoint": {"numpy", "huggingface_hub", "torch"},
    "spec": set(),
    "specs": set(),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for folder, prefix in (
        (ROOT / "llmconvert", ""),
        (ROOT / "converters", "converters."),
        (ROOT / "specs", "specs."),
    ):
        for path in sorted(folder.rglob("*.py")):
            inner = ".".join(path.relative_to(folder).with_suffix("").parts)
            name = f"llmconvert.{prefix}{inner}"
            found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()
LAYERS = {name.split(".")[1] for name in MODULES if name != "llmconvert"}


def imports(name: str, *, top_level: bool = False) -> Iterator[str]:
    """The full names `name` imports, anywhere in it or, with `top_level`, only when it is itself imported."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from llmconvert import convert` reaches another layer through the lazy public names.
                public = llmconvert._PUBLIC.get(alias.name) if base == "llmconvert" else None
                yield public[0] if public else f"{base}.{alias.name}"
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        type_checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        if not (top_level and (deferred or type_checking)):
            pending.extend(ast.iter_child_nodes(node))


def layer(name: str) -> str | None:
    """`checkpoint` for `llmconvert.checkpoint.safetensors`; None for `llmconvert` and other packages."""
    parts = name.split(".")
    return parts[1] if parts[0] == "llmconvert" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) in MAY_IMPORT])
def test_a_layer_imports_only_what_lies_below_it(name: str) -> None:
    own = layer(name)
    reached = {target: layer(target) for target in imports(name) if layer(target) not in (None, own)}
    wrong = {target for target, other in reached.items() if other not in MAY_IMPORT[own]}
    assert not wrong, f"{name} imports {sorted(wrong)}; {own} may import {sorted(MAY_IMPORT[own])}"


def test_nothing_imports_the_command_line() -> None:
    allowed = {"llmconvert.__main__"}
    wrong = {
        name for name in MODULES if layer(name) != "cli" and any(layer(target) == "cli" for target in imports(name))
    }
    assert wrong <= allowed


def test_nothing_but_the_command_line_imports_training() -> None:
    wrong = {
        name for name in MODULES if layer(name) not in ("cli", "training")
        and any(layer(target) == "training" for target in imports(name))
    }  # fmt: skip
    assert not wrong


def test_every_layer_has_its_rule() -> None:
    assert LAYERS - set(MAY_IMPORT) <= {"cli", "__main__"}


@pytest.mark.parametrize("name", [name for name in MODULES if layer(name) in THIRD_PARTY])
def test_the_lowest_layers_and_specs_need_little(name: str) -> None:
    packages = {target.split(".")[0] for target in imports(name)} - set(sys.stdlib_module_names) - {"llmconvert"}
    assert packages <= THIRD_PARTY[layer(name)]


@pytest.mark.parametrize("name", list(MODULES))
def test_importing_a_module_imports_nothing_heavy(name: str) -> None:
    if layer(name) in ("verify", "models", "debug", "infer") or name in FOR_TRAINING:
        pytest.skip("a model is needed there; the command line imports it late")
    wrong = {target for target in imports(name, top_level=True) if target.split(".")[0] in HEAVY}
    assert not wrong, f"{name} imports {sorted(wrong)} when it is imported: do it inside the function that needs it"


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("llmconvert.specs.")])
def test_a_spec_is_data(name: str) -> None:
    code = (
        ast.FunctionDef,
        ast.ClassDef,
        ast.Lambda,
        ast.If,
        ast.For,
        ast.While,
        ast.Try,
        ast.With,
        ast.comprehension,
    )
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    found = [f"{type(node).__name__} in line {node.lineno}" for node in ast.walk(tree) if isinstance(node, code)]
    assert not found, f"{name}: {found}"
    assert ast.get_docstring(tree), f"{name} does not say what it describes, nor its source"


def test_the_reader_of_imports_sees_what_it_must() -> None:
    """A test that finds nothing proves nothing: these edges exist."""
    assert any(layer(target) == "checkpoint" for target in imports("llmconvert.tensors.evaluate"))
    assert any(target.split(".")[0] in HEAVY for target in imports("llmconvert.tensors.evaluate"))
    assert layer("llmconvert.specs.llama") == "specs" and layer("numpy.typing") is None
