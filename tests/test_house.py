"""The rules of the house, checked on the source: who may import what, and what importing us costs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"orthoft": ROOT / "orthoft", "orthoft.merging": ROOT / "merging", "orthoft.recipes": ROOT / "recipes"}
FLOORS = [
    "errors",
    "citations",
    "loading",
    "linalg",
    "reflections",
    "krylov",
    "bases",
    "givens",
    "sparse",
    "delta",
    "adapter",
    "spectral",
    "peft_compat",
    "quantization",
    "config",
    "layouts",
    "layer",
    "tuner",
    "reporting",
    "trainer",
    "adapters",
    "merging",
    "convert",
    "recipes",
    "cli",
]
HOSTS_OF_PEFT = {f"orthoft.{name}" for name in ("peft_compat", "quantization", "config", "layer", "tuner")}


def modules() -> Iterator[tuple[str, Path]]:
    """All modules of the package as (name once installed, file)."""
    for package, folder in ROOMS.items():
        for file in sorted(folder.rglob("*.py")):
            if not any(parent.is_symlink() for parent in file.parents):
                parts = file.relative_to(folder).with_suffix("").parts
                yield ".".join([package, *parts]).removesuffix(".__init__"), file


def imported(file: Path) -> set[str]:
    """What a file imports anywhere in it, as "package.module.name", outside of `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports are not used here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


IMPORTS = {name: imported(file) for name, file in modules()}


def users(*packages: str) -> set[str]:
    return {module for module, names in IMPORTS.items() if any(n.split(".")[0] in packages for n in names)}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


RENAMES = "orthoft.merging.sources.renames"  # asks transformers for names, inside a function


def test_finds_the_modules() -> None:
    assert {
        "orthoft",
        "orthoft.tuner",
        "orthoft.adapters.hra",
        "orthoft.merging.methods.ties",
        "orthoft.recipes",
    } <= set(IMPORTS)
    assert "peft.config.PeftConfig" in IMPORTS["orthoft.config"]


def test_who_speaks_to_peft() -> None:
    others = {m for m in users("peft") - HOSTS_OF_PEFT if room(m) not in ("adapters", "recipes")}
    assert not others


def test_who_speaks_to_transformers() -> None:
    assert {room(m) for m in users("transformers") - {RENAMES}} <= {"layouts", "trainer", "recipes"}
    assert {room(m) for m in users("datasets", "accelerate")} <= {"recipes"}


def test_imports_run_one_way() -> None:
    for module, names in IMPORTS.items():
        if module == "orthoft":
            continue
        for name in names:
            if name.startswith("orthoft.") and room(name) in FLOORS:
                assert FLOORS.index(room(name)) <= FLOORS.index(room(module)), f"{module} imports {name}"


def test_merging_stands_alone() -> None:
    for module, names in IMPORTS.items():
        if room(module) == "merging":
            for name in names:
                outside = name.split(".")[0]
                assert outside != "peft", module
                assert outside != "transformers" or module == RENAMES, module
                assert room(name) not in ("config", "layouts", "layer", "tuner", "adapters", "peft_compat"), module


def test_installed_packages_are_the_folders() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(m for m, file in modules() if file.name == "__init__.py")
    for package, folder in settings["package-dir"].items():
        assert (ROOT / folder).samefile(ROOMS[package])
    for name in ("merging", "recipes"):
        assert (ROOT / "orthoft" / name).is_symlink()


def python(code: str) -> None:
    """Run code in a fresh interpreter, outside the checkout's folder."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_orthoft_is_free() -> None:
    python("import sys, orthoft; assert not {'torch', 'peft', 'transformers', 'pydantic'} & set(sys.modules)")


def test_importing_merging_leaves_peft_and_transformers_out() -> None:
    python("import sys, orthoft.merging; assert not {'peft', 'transformers', 'orthoft.tuner'} & set(sys.modules)")


KNOWN = """
from peft import PeftConfig, get_peft_config
from peft.utils import PeftType
import sys
assert "orthoft.adapters" in sys.modules
for name in ("ORTHOFT_OFTV2", "ORTHOFT_HRA"):
    assert PeftType(name) is PeftType[name] is getattr(PeftType, name) and PeftType(name) in list(PeftType)
    config = get_peft_config({"peft_type": name})
    assert config.peft_type == name and type(config).__module__.startswith("orthoft.adapters")
import peft
assert peft.__spec__ is not None and not any(type(f).__module__.startswith("orthoft") for f in sys.meta_path)
"""


@pytest.mark.parametrize("first", ["import orthoft; import peft", "import peft; import orthoft"])
def test_peft_knows_the_methods_in_either_order(first: str) -> None:
    python(first + "\n" + KNOWN)


def test_unknown_attribute_is_an_attribute_error() -> None:
    import orthoft

    with pytest.raises(AttributeError, match="no attribute 'LoraConfig'"):
        orthoft.LoraConfig  # noqa: B018
    for name in orthoft.__all__:
        assert getattr(orthoft, name) is not None
