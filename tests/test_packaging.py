"""The wheel: what it holds, and that it works away from the checkout; the guards against a second copy."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ("llmconvert", "converters", "specs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, so that nothing is left behind in the checkout."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in (*SHIPPED, "tests", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages that holds the wheel and nothing else."""
    target = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--target",
        str(target),
    ]
    subprocess.run([*command, str(wheel)], check=True, capture_output=True)
    return target


def python(code: str, *paths: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` with `paths` first and the checkout out of sight, installed as editable or not."""
    hide = f"sys.path[:] = [p for p in sys.path if p != {str(ROOT)!r}]"
    full = f"import sys; {hide}; sys.path[:0] = {[str(path) for path in paths]!r}\n{code}"
    return subprocess.run([sys.executable, "-I", "-c", full], cwd=cwd, capture_output=True, text=True, check=False)


def test_only_llmconvert_lands_in_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"llmconvert"}
    assert all(name.startswith("llmconvert-") for name in top - {"llmconvert"})
    assert len(names) == len(set(names))


def test_the_wheel_holds_every_module_once(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".py")}
    expected = set()
    for folder in SHIPPED:
        for path in (ROOT / folder).rglob("*.py"):
            inside = path.relative_to(ROOT).as_posix()
            expected.add(inside if folder == "llmconvert" else f"llmconvert/{inside}")
    assert len(expected) > 20
    assert held == expected


def test_the_wheel_has_its_command_and_licence(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (entry_points,) = (name for name in archive.namelist() if name.endswith("entry_points.txt"))
    assert "llmconvert = llmconvert.cli.app:main" in archive.read(entry_points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def test_the_wheel_works_from_another_directory(installed: Path, tmp_path: Path) -> None:
    code = """
import llmconvert, llmconvert.converters, llmconvert.specs, llmconvert.specs.llama
for module in (llmconvert, llmconvert.converters, llmconvert.specs, llmconvert.specs.llama):
    print(module.__file__)
assert len(llmconvert.__path__) == 1, llmconvert.__path__
assert callable(llmconvert.convert)
"""
    ran = python(code, installed, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert all(line.startswith(str(installed)) for line in ran.stdout.splitlines())


def test_the_wheel_finds_its_specs_and_its_command(installed: Path, tmp_path: Path) -> None:
    code = 'import runpy; sys.argv[1:] = ["specs", "--json"]; runpy.run_module("llmconvert", run_name="__main__")'
    ran = python(code, installed, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert '"baichuan"' in ran.stdout
    assert str(ROOT) not in ran.stdout


def test_the_checkout_works_from_another_directory(tmp_path: Path) -> None:
    code = """
import pathlib, llmconvert, llmconvert.converters, llmconvert.specs
for module in (llmconvert, llmconvert.converters, llmconvert.specs):
    print(pathlib.Path(module.__file__).parent)
"""
    ran = python(code, ROOT, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [str(ROOT / name) for name in SHIPPED]


def test_the_path_is_extended_only_in_a_checkout(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "llmconvert", tmp_path / "llmconvert", ignore=shutil.ignore_patterns("__pycache__"))
    ran = python("import llmconvert; print(len(llmconvert.__path__))", tmp_path, cwd=tmp_path)
    assert ran.stdout.strip() == "1", ran.stderr


@pytest.mark.parametrize("wrong", ["specs", "converters", "llmconvert.llmconvert"])
def test_a_second_copy_is_refused(wrong: str, tmp_path: Path) -> None:
    right = "llmconvert" if wrong == "llmconvert.llmconvert" else f"llmconvert.{wrong}"
    ran = python(f"import {wrong}", ROOT, cwd=tmp_path)
    assert ran.returncode != 0
    assert f"ImportError: import `{right}`, not `{wrong}`" in ran.stderr


def test_importing_the_package_is_cheap(tmp_path: Path) -> None:
    code = """
import llmconvert
assert "convert" in dir(llmconvert) and llmconvert.__version__
heavy = {"numpy", "torch", "transformers", "typer", "rich", "huggingface_hub", "safetensors"} & set(sys.modules)
assert not heavy, heavy
try:
    llmconvert.nothing
except AttributeError as error:
    print(error)
"""
    ran = python(code, ROOT, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "module 'llmconvert' has no attribute 'nothing'"


def test_public_names_stay_functions(tmp_path: Path) -> None:
    """A subpackage of the same name would replace the function once something imports it."""
    code = """
import llmconvert
for _ in range(2):
    for name in set(llmconvert.__all__) - {"__version__"}:
        assert type(getattr(llmconvert, name)).__name__ == "function", name
"""
    ran = python(code, ROOT, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_the_command_line_starts_without_torch(tmp_path: Path) -> None:
    code = """
import llmconvert.cli.app
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""
    ran = python(code, ROOT, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="bash scripts")
@pytest.mark.parametrize(
    "script", [".ci/run", *(f"scripts/{name}" for name in ("check", "setup.sh", "test", "test-transformers-4", "test-trl", "venv-vllm"))]
)
def test_scripts_are_sound_bash(script: str) -> None:
    checked = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr
    assert script.endswith(".sh") or os.access(ROOT / script, os.X_OK)
