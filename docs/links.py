"""docs/links.py: which definition does each name in the code mean?

    source("projector").places      {"projector.VLM.embed": its node in the syntax tree, ...}
    resolve("data.load_image")      "formats.pictures.load_image": through imports and base classes
    names_in(source("projector"))   {line: [(first column, last column, full name), ...]}

Modules are parsed, not imported. The syntax tree says which class `self` is, which names are local
and what was imported from where. It has no types: it cannot say whose method `cache.update` is. For
that there is TYPES: which class stands behind a variable or an attribute of that name.
"""

import ast
import functools
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFINES = ast.ClassDef, ast.FunctionDef
TYPES = {       # name, or module.name, or function.name: what it stands for there
    "cache": "llama.KVCache", "llm": "llama.Llama", "llama.model": "llama.Llama",
    "model": "projector.VLM", "vlm": "projector.VLM", "projector": "projector.QFormerProjector",
    "vision": "clip.ViT", "clip": "clip.CLIP", "clip.model": "clip.ViT",
    "qformer": "qformer.QFormer", "queries": "qformer.QFormer", "lm_head": "qformer.LMHead",
    "qformer.model": "qformer.Blip2Stage1", "train.blip2_stage1_job.model": "qformer.Blip2Stage1",
    "tokenizer": "data.Tokenizer", "qformer_tokenizer": "formats.bert.BertTokenizer",
    "qformer.tokenizer": "formats.bert.BertTokenizer",
    "t": "data.Template", "segment": "data.Segment", "row": "train.Stage", "job": "train.TrainJob",
    "grid": "formats.anyres.AnyresGrid", "family": "formats.families.Family",
    "run": "trainer.run_folder.Run", "gradients": "trainer.step.GradientStep",
    "samples": "trainer.loader.Samples", "train.batch": "trainer.loader.MicroBatch",
    "sampler": "generate.Sampler", "best": "decoding.beam.Ended",
    "end": "decoding.stopping.AnswerEnd",
    "generate.print_answer.answer": "decoding.answer.Generation"}


def read(path):
    """The text of a file, by its path in the repository."""
    return (ROOT / path).read_text(encoding="utf-8")


class Source:
    """A Python file: its definitions, what it imports, and the bases of its classes."""

    def __init__(self, path, module):
        self.path, self.module = path, module
        self.text = read(path)
        self.lines, self.tree = self.text.split("\n"), ast.parse(self.text)
        self.places, self.imports, self.bases = {}, {}, {}
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                front = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = front + alias.name
        self.define(self.tree.body, module)

    def define(self, body, prefix):
        """Functions, classes and names of a module or class; what its methods store in self."""
        for node in body:
            if isinstance(node, DEFINES):
                self.places.setdefault(f"{prefix}.{node.name}", node)
            if isinstance(node, ast.ClassDef):
                self.bases[f"{prefix}.{node.name}"] = [ast.unparse(base) for base in node.bases]
                self.define(node.body, f"{prefix}.{node.name}")
            elif isinstance(node, ast.FunctionDef) and prefix in self.bases:
                for part in ast.walk(node):
                    if isinstance(part, ast.Attribute) and is_stored(part):
                        if isinstance(part.value, ast.Name) and part.value.id == "self":
                            self.places.setdefault(f"{prefix}.{part.attr}", part)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in getattr(node, "targets", None) or [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            self.places.setdefault(f"{prefix}.{part.id}", node)

    def find(self, rest):
        """["VLM", "embed"] -> the full name of the definition, maybe in a base class; or None."""
        full = ".".join([self.module, *rest])
        if rest[0] in self.imports:         # first: kernels/ wraps names that it imports
            return resolve(".".join([self.imports[rest[0]], *rest[1:]]))
        if full in self.places:
            return full
        for base in self.bases.get(full.rpartition(".")[0], ()):
            if found := resolve(f"{self.module}.{base}.{rest[-1]}"):
                return found


def is_stored(node):
    return isinstance(getattr(node, "ctx", None), ast.Store)


@functools.cache
def source(module):
    """The Source of a module of this project, as "kernels.attention"; or None."""
    stem = module.replace(".", "/")
    paths = [path for path in (f"{stem}/__init__.py", f"{stem}.py") if (ROOT / path).is_file()]
    return Source(paths[0], module) if paths else None


@functools.cache
def resolve(dotted):
    """The full name of the definition that `dotted` means; None if it is not of this project."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        here = source(".".join(parts[:n]))
        if here is not None and parts[n:]:
            return here.find(parts[n:])
        if here is not None:                # a module, or what its package imports by that name:
            package = source(".".join(parts[:-1]))          # kernels.attention is a function
            return (package and package.find(parts[-1:])) or dotted


def module_of(full):
    """The module in which the definition of a full name stands."""
    parts = full.split(".")
    while source(".".join(parts)) is None:
        parts.pop()
    return ".".join(parts)


class Names(ast.NodeVisitor):
    """Collects the names of one file that mean definitions of the project."""

    def __init__(self, here):
        self.here, self.cls, self.local, self.found = here, None, set(), {}
        self.scope = here.module            # the full name of the function or class around
        self.visit(here.tree)

    def add(self, line, end, name, full):
        """name ends at the byte `end` of its line."""
        text = self.here.lines[line - 1]
        last = len(text.encode()[:end].decode(errors="ignore"))
        first = last - len(name)
        # before Python 3.12 the positions of names inside an f-string are wrong
        if full and first >= 0 and text[first:last] == name:
            self.found.setdefault(line, []).append((first, last, full))

    def visit_ClassDef(self, node):
        outer = self.cls, self.scope
        self.cls = self.scope = f"{self.here.module}.{node.name}"
        self.generic_visit(node)
        self.cls, self.scope = outer

    def visit_FunctionDef(self, node):
        outer, local = (self.local, self.scope), set(self.local)
        for part in ast.walk(node):
            if isinstance(part, ast.arg):
                local.add(part.arg)
            elif isinstance(part, ast.Name) and is_stored(part):
                local.add(part.id)
            elif isinstance(part, ast.FunctionDef) and part is not node:
                local.add(part.name)
        self.local, self.scope = local, f"{self.scope}.{node.name}"
        self.generic_visit(node)
        self.local, self.scope = outer

    def visit_Name(self, node):
        if node.id not in self.local and not is_stored(node):
            self.add(node.lineno, node.end_col_offset, node.id, self.definition(node))

    def visit_Attribute(self, node):
        self.add(node.end_lineno, node.end_col_offset, node.attr, self.definition(node))
        self.generic_visit(node)

    def visit_ImportFrom(self, node):
        for alias in node.names:
            self.add(alias.lineno, alias.col_offset + len(alias.name.encode()), alias.name,
                     resolve(f"{node.module}.{alias.name}"))

    def visit_Import(self, node):
        for alias in node.names:
            self.add(alias.lineno, alias.col_offset + len(alias.name.encode()), alias.name,
                     resolve(alias.name))

    def definition(self, node):
        """The full name of what a name or an attribute means; None: not of this project."""
        if isinstance(node, ast.Name):
            return resolve(f"{self.here.module}.{node.id}")
        owner = self.kind(node.value)
        return owner and resolve(f"{owner}.{node.attr}")

    def kind(self, node):
        """The class or module that an expression is, as far as its name says."""
        if isinstance(node, ast.Call):
            return self.kind(node.func)
        name = getattr(node, "id", getattr(node, "attr", None))
        if name in ("self", "cls") and self.cls:
            return self.cls
        if name in ("c", "config"):         # each model's file has its own Config
            owner = self.kind(node.value) if isinstance(node, ast.Attribute) else self.cls
            return resolve(f"{module_of(owner or self.here.module)}.Config")
        if isinstance(node, ast.Name) and node.id not in self.local:
            return self.definition(node)
        owner = self.scope
        while owner and f"{owner}.{name}" not in TYPES:
            owner = owner.rpartition(".")[0]
        known = TYPES.get(f"{owner}.{name}" if owner else name)
        if known:
            return known
        return self.definition(node) if isinstance(node, ast.Attribute) else None


def names_in(here):
    """{line: [(first column, last column, full name)]} of a Source."""
    return Names(here).found
