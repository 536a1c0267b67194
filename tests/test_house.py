"""The rules of the house, read from the source: who may import whom, what stands behind which door, what a module must say."""

from __future__ import annotations

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import wsimil.errors

PACKAGE = Path(wsimil.errors.__file__).parent

GROUND = {"units", "errors", "config", "settings", "batch", "task", "losses", "files", "hdf5", "memory", "table"}
PARTS = {"slides", "encoders", "bags", "aggregators", "evaluation"}
OBJECTIVES = {"objectives"}
WORKFLOWS = {
    "extraction", "pretraining", "probing", "training", "prediction", "retrieval", "heatmaps", "study", "report", "viewer",
    "doctor", "progress", "conversion", "validation",
}  # fmt: skip
TOP = {"cli", "demo", "__main__", "__init__"}
EVERYTHING = GROUND | PARTS | OBJECTIVES | WORKFLOWS | TOP

DOORS = {
    "openslide": {"slides"},
    "tifffile": {"slides"},
    "simplejpeg": {"slides"},
    "imagecodecs": {"slides"},
    "h5py": {"hdf5"},
    "timm": {"encoders"},
    "lightning": {"training", "pretraining"},
    "numba": {"aggregators"},
    "llvmlite": {"aggregators"},
    "pytorch_lightning": {"training", "pretraining"},
}
"""Library → the units of wsimil that may import it."""

HEAVY = ("torch", "timm", "lightning", "pandas", "matplotlib", "numba")
"""What `wsimil --help` must not wait for."""


def may_import(unit: str) -> set[str]:
    """Units of wsimil (its top-level modules and folders) that `unit` may import."""
    if unit in GROUND:
        return GROUND
    if unit in PARTS:
        return GROUND | {unit}
    if unit in OBJECTIVES:
        return GROUND | OBJECTIVES
    if unit in WORKFLOWS:
        return GROUND | PARTS | OBJECTIVES | WORKFLOWS
    return EVERYTHING


def imports_of(source: str, module: str) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a module imports: at the top, in a function, for type checking, by relative name.

    `module` is the dotted name of the module; a package's is that of its folder with `.__init__`.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*module.split(".")[: -node.level], base]).rstrip(".")
            # `from wsimil import training` names a module only in its last part
            found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found += [(node.lineno, argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)]
    return found


def offences(source: str, module: str) -> list[str]:
    """Imports of a module that the rules forbid, each as a sentence."""
    unit = module.split(".")[1]
    if unit not in EVERYTHING:
        return [f"{module} has no place among ground, parts, objectives, workflows and top; give it one in this test"]
    sentences = []
    for line, name in imports_of(source, module):
        library, _, inside = name.partition(".")
        if library == "wsimil":
            imported = inside.split(".")[0]
            dunder = imported.startswith("__") and imported not in TOP  # `from wsimil import __version__`
            if imported not in may_import(unit) and not dunder:
                sentences.append(f"{module}:{line} imports {name}; {unit} may not")
        elif unit not in DOORS.get(library, {unit}):
            sentences.append(f"{module}:{line} imports {library}; only {', '.join(sorted(DOORS[library]))} may")
    return sentences


def module_name(path: Path) -> str:
    return ".".join(["wsimil", *path.relative_to(PACKAGE).with_suffix("").parts])


SOURCES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def test_the_whole_package_is_read():
    assert {"wsimil.errors", "wsimil.aggregators.__init__", "wsimil.objectives.slide_label"} <= SOURCES.keys()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_point_down_only(module):
    assert not offences(SOURCES[module], module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wsimil.batch", "from wsimil.aggregators.packed import segment_sum"),
        ("wsimil.errors", "import wsimil.training"),
        ("wsimil.aggregators.abmil", "from wsimil.bags import bag"),
        ("wsimil.aggregators.abmil", "from ..bags.dataset import BagDataset"),
        ("wsimil.aggregators.__init__", "from ..bags import dataset"),
        ("wsimil.aggregators.abmil", "from wsimil import training"),
        ("wsimil.aggregators.abmil", "from .. import encoders"),
        ("wsimil.aggregators.abmil", "from wsimil import ABMIL"),  # through the lazy public names
        ("wsimil.aggregators.abmil", "import wsimil"),
        ("wsimil.objectives.clam", "def late():\n    from wsimil.aggregators.abmil import ABMIL"),
        ("wsimil.objectives.clam", "if TYPE_CHECKING:\n    from wsimil.encoders.vit import ViT"),
        ("wsimil.slides.slide", "import importlib\nimportlib.import_module('wsimil.bags')"),
        ("wsimil.extraction.engine", "from wsimil.cli import main"),
        ("wsimil.bags.bag", "import h5py"),
        ("wsimil.extraction.local", "import openslide"),
        ("wsimil.heatmaps", "from tifffile import imwrite"),
        ("wsimil.pretraining", "from timm.models import create_model"),
        ("wsimil.aggregators.abmil", "import lightning.pytorch as pl"),
        ("wsimil.helpers", ""),
    ],
)
def test_the_rule_catches_an_offender(module, source):
    assert offences(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("wsimil.batch", "from wsimil.errors import AggregatorInputError\nimport torch"),
        (
            "wsimil.aggregators.abmil",
            "from wsimil.aggregators.packed import segment_sum\nfrom . import packed\nfrom ..batch import BagBatch",
        ),
        ("wsimil.aggregators.__init__", "from .abmil import ABMIL\nfrom ..config import nearest"),
        ("wsimil.objectives.clam", "from wsimil.objectives.slide_label import SlideLabel"),
        ("wsimil.training", "import lightning\nfrom wsimil.bags import dataset\nfrom wsimil.objectives import SlideLabel"),
        ("wsimil.study", "from wsimil import training, prediction"),
        ("wsimil.extraction.engine", "from wsimil import __version__"),
        ("wsimil.hdf5", "import h5py"),
        ("wsimil.cli", "from wsimil.training import train"),
        ("wsimil.__init__", "from wsimil.slides.slide import Slide"),
    ],
)
def test_the_rule_lets_honest_imports_pass(module, source):
    assert not offences(source, module)


@pytest.mark.parametrize("module", SOURCES)
def test_every_module_says_what_it_decides(module):
    docstring = ast.get_docstring(ast.parse(SOURCES[module]))
    assert docstring and docstring.splitlines()[0].rstrip().endswith((".", ":", ";"))


def names_of(source: str) -> tuple[set[str], list[str] | None]:
    """Names a module binds at its top level, and its `__all__`."""
    bound: set[str] = set()
    public = None
    statements = list(ast.parse(source).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            statements += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            statements += [child for handler in getattr(node, "handlers", []) for child in handler.body]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
            if "__all__" in {getattr(target, "id", "") for target in targets} and isinstance(node.value, ast.List | ast.Tuple):
                public = [ast.literal_eval(element) for element in node.value.elts]
    return bound, public


@pytest.mark.parametrize("module", SOURCES)
def test_public_names_exist(module):
    bound, public = names_of(SOURCES[module])
    if "__getattr__" in bound:  # lazy names: ask the module itself
        loaded = importlib.import_module(module.removesuffix(".__init__"))
        assert [name for name in loaded.__all__ if not hasattr(loaded, name)] == []
    elif public is not None:
        assert len(public) == len(set(public))
        assert set(public) <= bound


def test_public_names_are_really_compared():
    source = '__all__ = ["a", "b"]\nif True:\n    import c.d\ntry:\n    e = 1\nexcept ImportError:\n    f, g = 1, 2\ndef a(): h = 1'
    assert names_of(source) == ({"__all__", "a", "c", "e", "f", "g"}, ["a", "b"])


def run_python(code: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_waits_for_nothing_heavy():
    loaded = run_python(f"import wsimil, wsimil.cli, sys; print(*[name for name in {HEAVY} if name in sys.modules])")
    assert loaded.split() == []


def test_importing_changes_nothing_outside():
    code = """
import logging, os, random
before = dict(os.environ), list(logging.root.handlers), logging.root.level, random.getstate()
import wsimil, wsimil.cli, wsimil.config, wsimil.task, wsimil.files
after = dict(os.environ), list(logging.root.handlers), logging.root.level, random.getstate()
print(before == after)
"""
    assert run_python(code).strip() == "True"
