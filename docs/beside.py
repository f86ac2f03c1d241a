"""docs/beside.py: the pictures and the exercises of the book.

    figures      the pictures that stand at a definition
    tries        links to the exercises about it
    exercises    the chapter of the twelve: each has its text and signature, and no solution
    lists        the lines of the contents that name exercises, pictures and questions

The chapter stands in front of the code, so that an exercise is met before the function that
solves it.
"""

import ast
import base64
import html
import re
import sys
from pathlib import Path

from docs.links import read, resolve
from docs.markup import prose

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {    # docs/pictures/NAME.svg or NAME.png -> the definition it explains, and a caption
    "way": ("projector.VLM", "A photo's way to an answer, with a shape on every arrow"),
    "splice": ("projector.splice", "The spliced row, and the row of its labels"),
    "logit_lens": ("projector.VLM.forward", "The word that each patch says at each layer"),
    "knock_out": ("projector.VLM.embed", "What is lost without an object's patches, by layer"),
    "packed": ("data.pack", "Rows packed, and rows padded"),
    "frozen": ("train.set_trainable", "What is frozen and what trains, recipe by recipe"),
    "memory": ("train.make_optimizers", "Where the memory of one step at 7B goes"),
    "learning": ("train.train_loop",
                 "Learning to see: the toy in stage 1 of the recipe llava-1.5, what it says of one "
                 "picture after so many steps, and its loss. 2 of 3: two of the picture's three "
                 "objects are named"),
    "masks": ("qformer.itc", "The three masks, and the loss that each of them serves"),
    "tiles": ("kernels.attention.walk", "The tiles that are skipped under each mask")}
EXERCISES = (   # the definition that exercise n is about
    "clip.ViT.embed", "clip.ViT.embed", "clip.Block.forward", "data.tokenize_segments",
    "projector.splice", "llama.Block.forward", "llama.KVCache.update", "qformer.itc",
    "qformer.itc_loss", "qformer.hard_negatives", "data.pack", "kernels.attention.fold")
SOLUTIONS = {3: "kernels.swiglu.quick_gelu", 6: "kernels.rope.rope_spec",
             11: "trainer.loader.token_weights"}        # where they stand elsewhere
QUESTION = r'<h3 id="(question-\d+)">(.*?)</h3><p lang="ko">(.*?)</p>'


def figures(full):
    """The pictures that explain a definition."""
    out = ""
    for name, (where, caption) in PICTURES.items():
        files = sorted(ROOT.glob(f"docs/pictures/{name}.*"))
        if where == full and not files:
            sys.exit(f"docs/build.py: no picture {name}: python docs/figures.py {name} draws it")
        if where == full:
            kind = files[0].suffix[1:].replace("svg", "svg+xml")
            data = base64.b64encode(files[0].read_bytes()).decode()
            out += (f'<figure id="picture-{name}"><img alt="{caption}" src="data:image/{kind};'
                    f'base64,{data}"><figcaption>{caption}</figcaption></figure>')
    return out


def tries(full):
    """Links to the exercises about a definition, by their titles."""
    return "".join(f'<p class="try"><a href="#exercise-{n}">Exercise {n}: {title(n)}</a></p>'
                   for n, where in enumerate(EXERCISES, 1) if where == full)


def tree(n):
    """The syntax tree of an exercise's file, and the file's text."""
    (path,) = sorted(ROOT.glob(f"exercises/ex{n:02}_*.py"))
    text = read(path.relative_to(ROOT))
    return ast.parse(text), text.split("\n")


def title(n):
    """"the labels of a conversation" of "Exercise 4: the labels of a conversation."."""
    first = ast.get_docstring(tree(n)[0]).split("\n")[0]
    return html.escape(first.split(": ", 1)[1].rstrip("."), quote=False)


def exercises():
    """The chapter: of each exercise the text and the functions to write."""
    out = ""
    for n in range(1, len(EXERCISES) + 1):
        module, lines = tree(n)
        text = ast.get_docstring(module).split("\n", 1)[1]
        text = text.replace(f"\n\n    python -m exercises {n}", "")       # it stands by the code
        functions = [node for node in module.body if isinstance(node, ast.FunctionDef)]
        code = "\n\n".join("\n".join(lines[node.lineno - 1:node.end_lineno]) for node in functions)
        full = SOLUTIONS.get(n, EXERCISES[n - 1])
        # behind a click: whoever wants to solve it should not see where it is solved
        out += (f'<h3 id="exercise-{n}">Exercise {n}: {title(n)}</h3><div class=ex>'
                f"<div>{prose(text, 'exercises')}</div><div><pre>{html.escape(code)}</pre>"
                f"<p>Write it, and check it with <code>python -m exercises {n}</code>.</p>"
                f"<details><summary>The project's own</summary><p><a href=\"#{resolve(full)}\">"
                f"{full}</a></p></details></div></div>")
    return out


def lists(questions):
    """{place in docs/page.html: the links of exercises, pictures and questions}."""
    numbers = range(1, len(EXERCISES) + 1)
    rows = {"{EXERCISE_LIST}": [(f"exercise-{n}", f"{n}. {title(n)}", "") for n in numbers],
            "{PICTURE_LIST}": [(f"picture-{name}", caption.split(":")[0], "")
                               for name, (_, caption) in PICTURES.items()],
            "{QUESTION_LIST}": re.findall(QUESTION, questions)}
    out = {}
    for place, links in rows.items():
        out[place] = ""
        for href, words, korean in links:
            line = f'<span lang="ko">{korean}</span>' if korean else ""
            out[place] += f'<li><a href="#{href}">{words}</a>{line}</li>'
    return out
