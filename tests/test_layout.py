"""The house stands as its design says: floors, file sizes, names at the top, no circle of imports.

Each rule is a function from files {path: text} to a list of faults. It is run on the repository,
and as a control on a few files with one fault each.
"""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# the seven files of the tutorial, and the most lines of each
TUTORIAL = {"clip.py": 300, "qformer.py": 430, "llama.py": 260, "projector.py": 400,
            "data.py": 400, "train.py": 400, "generate.py": 300}
MOST_LINES_OF_A_ROOM_FILE = 400         # kernels/ aside: there an operation is one file
MOST_LINES_OF_A_FUNCTION = 50           # in the seven
TOP = {"README.md", "requirements.txt", "Makefile", "LICENSE", ".gitignore", ".ci",
       "pyproject.toml", *TUTORIAL, "kernels", "formats", "trainer", "decoding", "llms", "toy",
       "evaluate", "instruct", "bench", "exercises", "docs", "tests"}
# a file may import what stands on its own floor or below
FLOOR = {"formats": 1, "kernels": 1, "data": 2, "toy": 2, "clip": 3, "llama": 3, "llms": 3,
         "qformer": 4, "toy.parts": 4, "projector": 5, "decoding": 6, "generate": 7, "trainer": 8,
         "train": 9, "instruct": 10, "evaluate": 11, "bench": 12, "exercises": 12, "docs": 12}
# `python data.py check` hands over to trainer/doctor.py
MAY_HAND_OVER = ("data.py",)


def tracked():
    """The paths that git knows; where it is missing, those that no line of .gitignore names."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0 and done.stdout:
        return [path for path in done.stdout.splitlines() if (ROOT / path).exists()]
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file()]
    return [str(path) for path in found if not ignored & {*path.parts} and ".git" != path.parts[0]]


@pytest.fixture(scope="module")
def files():
    return {path: (ROOT / path).read_text(encoding="utf-8")
            for path in tracked() if path.endswith(".py") and not path.startswith("tests/")}


# ---------------------------------------------------------------------------------- reading

def is_main_block(node):
    return isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)


def imported(path, text):
    """The dotted names that a file imports anywhere: "toy.parts.clip_job" for `from toy.parts
    import clip_job`. Left out: the block `if __name__ == "__main__"`, where files hand over."""
    tree = ast.parse(text)
    if path in MAY_HAND_OVER:
        tree.body = [node for node in tree.body if not is_main_block(node)]
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:                              # from .x import y
                module = ".".join([*path.split("/")[:-node.level], module]).strip(".")
            names += [f"{module}.{alias.name}" for alias in node.names]
    return names


def floor_of(dotted):
    """The floor of a module; None if it is not of this house."""
    if dotted == "toy.parts" or dotted.startswith("toy.parts."):
        return FLOOR["toy.parts"]
    return FLOOR.get(dotted.split(".")[0])


def module_of(path):
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def files_of(dotted, files):
    """The files that `import dotted` reads: of a.b.c the longest of a/b/c.py, a/b.py, a.py."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        stem = "/".join(parts[:n])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in files:
                return [path]
    return []


# ------------------------------------------------------------------------------------ rules

def upward_imports(files):
    faults = []
    for path, text in files.items():
        own = floor_of(module_of(path))
        for name in imported(path, text):
            floor = floor_of(name)
            if floor and own and floor > own:
                faults.append(f"{path} (floor {own}) imports {name} (floor {floor})")
    return faults


def files_without_floor(files):
    return [path for path in files if floor_of(module_of(path)) is None]


def circles(files):
    """Every circle of imports that a walk from some file meets: "a.py -> b.py -> a.py"."""
    graph = {}
    for path, text in files.items():
        graph[path] = {to for name in imported(path, text) for to in files_of(name, files)} - {path}
    faults, done = [], set()

    def walk(path, trail):
        if path in trail:
            faults.append(" -> ".join([*trail[trail.index(path):], path]))
        elif path not in done:
            for to in sorted(graph[path]):
                walk(to, [*trail, path])
            done.add(path)
    for path in sorted(graph):
        walk(path, [])
    return faults


def long_files(files):
    faults = []
    for path, text in files.items():
        lines = len(text.splitlines())
        most = TUTORIAL.get(path, MOST_LINES_OF_A_ROOM_FILE)
        if lines > most and not path.startswith("kernels/"):
            faults.append(f"{path}: {lines} lines, limit {most}")
    return faults


def long_functions(files):
    faults = []
    for path in TUTORIAL:
        for node in ast.walk(ast.parse(files.get(path, ""))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    faults.append(f"{path}: {node.name} has {lines} lines")
    return faults


def missing_docstrings(files):
    """Files, and functions and classes, that say TODO; files that say nothing."""
    faults = []
    for path, text in files.items():
        tree = ast.parse(text)
        if not ast.get_docstring(tree) and not path.endswith("__init__.py"):
            faults.append(f"{path}: no docstring")
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                if re.match(r"TODO\b", ast.get_docstring(node) or ""):
                    faults.append(f"{path}: {getattr(node, 'name', 'the file')} says TODO")
    return faults


def unnamed_at_the_top(paths):
    return sorted({path.split("/")[0] for path in paths} - TOP)


# ------------------------------------------------------------------------- on the repository

@pytest.mark.parametrize("rule", [upward_imports, files_without_floor, circles, long_files,
                                  long_functions, missing_docstrings])
def test_the_house_stands(files, rule):
    faults = rule(files)
    assert not faults, "\n" + "\n".join(faults)


def test_the_seven_are_there(files):
    assert set(TUTORIAL) <= set(files)
    assert sum(len(files[path].splitlines()) for path in TUTORIAL) <= 2500


def test_nothing_stands_at_the_top_that_the_design_does_not_name():
    assert not unnamed_at_the_top(tracked())


# -------------------------------------------------------------------------- negative controls

@pytest.mark.parametrize(
    "text, fault",
    [
        ("import train", True),
        ("from trainer.flags import parse", True),
        ("def f():\n    from train import RECIPES", True),
        ("from toy import parts", True),
        ("from toy.parts import clip_job", True),
        ("import data\nfrom formats.errors import note", False),
        ("from toy import world\nimport torch", False),
    ],
)
def test_an_upward_import_is_found(text, fault):
    """clip.py stands on floor 3: data, toy, formats are below, train, trainer and parts above."""
    assert bool(upward_imports({"clip.py": text})) == fault


def test_only_the_dataset_doctor_may_hand_over():
    text = 'if __name__ == "__main__":\n    from trainer.doctor import main'
    assert not upward_imports({"data.py": text}) and upward_imports({"clip.py": text})
    assert upward_imports({"data.py": "from trainer.doctor import main"})


def test_a_file_on_no_floor_is_found():
    assert files_without_floor({"utils.py": "", "clip.py": ""}) == ["utils.py"]


@pytest.mark.parametrize("texts, fault", [
    ({"a": "import b", "b": "import c", "c": "import a"}, True),
    ({"a": "import b", "b": "def f():\n    from a import x"}, True),
    ({"toy/a": "from toy import b", "toy/b": "from toy.a import x"}, True),
    ({"toy/a": "from .b import x", "toy/b": "from . import a"}, True),
    ({"a": "import b\nimport c", "b": "import c", "c": ""}, False)])
def test_a_circle_is_found(texts, fault):
    assert bool(circles({f"{name}.py": text for name, text in texts.items()})) == fault


def test_a_long_file_is_found():
    assert long_files({"llama.py": "x = 1\n" * 261, "toy/world.py": "x = 1\n" * 401}) == [
        "llama.py: 261 lines, limit 260", "toy/world.py: 401 lines, limit 400"]
    assert not long_files({"llama.py": "x = 1\n" * 260, "kernels/attention.py": "x = 1\n" * 700})


def test_a_long_function_is_found():
    body = "def f():\n" + "    x = 1\n" * 50
    assert long_functions({"clip.py": body}) == ["clip.py: f has 51 lines"]
    assert not long_functions({"clip.py": body.replace("    x = 1\n", "", 1)})
    inside = "class A:\n    def g(self):\n" + "        x = 1\n" * 50
    assert long_functions({"data.py": inside}) == ["data.py: g has 51 lines"]


@pytest.mark.parametrize(
    "text, fault",
    [
        ('"""TODO"""', True),
        ("x = 1", True),
        ('"""What it is."""\ndef f():\n    """TODO: say"""', True),
        ('"""A list of what a TODO list holds."""\nx = 1', False),
    ],
)
def test_a_docstring_that_says_nothing_is_found(text, fault):
    assert bool(missing_docstrings({"toy/world.py": text})) == fault


def test_a_stranger_at_the_top_is_found():
    assert unnamed_at_the_top(["README.md", "utils.py", "common/a.py", "toy/world.py"]) == [
        "common", "utils.py"]
