"""docs/markup.py: docstrings, comments, code and our Markdown pages as HTML.

    linked     a line of text, with `names` as links to their definitions
    prose      a docstring: paragraphs, and what is drawn with spaces as it stands
    markdown   a page of docs/, as far as our pages use Markdown
    painted    the lines of a file, keywords and strings in colour, names as links

A link to a definition is "#full.name"; docs/build.py gives every definition that place.
"""

import html
import io
import keyword
import re
import textwrap
import tokenize
from collections import defaultdict

from docs.links import names_in, resolve

DOTTED = r'(?<![\w./>#"])([a-z]\w*(?:\.[A-Za-z_]\w+)+)(?![\w./])'      # data.preprocess
PAPER = r"\b(\d{4}\.\d{5})\b"           # arXiv's numbers, as in [BLIP-2] 2301.12597


def linked(text, scope=""):
    """HTML of a text. `name` is looked up in scope, "projector.VLM.embed", and then outside it."""
    def code(match):
        owner, full = scope, None
        if re.fullmatch(r"[\w.]+", match[1]):
            while not full and owner:
                full = resolve(f"{owner}.{match[1]}")
                owner = owner.rpartition(".")[0]
            full = full or resolve(match[1])
        inner = f"<code>{match[1]}</code>" if match[0][0] == "`" else match[1]
        return f'<a href="#{full}">{inner}</a>' if full else inner
    text = re.sub(r"`([^`]+)`", code, html.escape(text, quote=False))
    text = re.sub(DOTTED, code, text)
    return re.sub(PAPER, r'<a href="https://arxiv.org/abs/\1">\1</a>', text)


def prose(text, scope=""):
    """Paragraphs as <p>. Lines that begin with a space, or two and more with gaps, are <pre>."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", (text or "").strip("\n")):
        lines = paragraph.split("\n")
        gaps = [re.match(r"\s|\S.*   +\S", line) is not None for line in lines]
        drawn = [gap and (line[:1] == " " or sum(gaps) > 1) for gap, line in zip(gaps, lines)]
        first = last = len(lines)
        if any(drawn):
            first, last = drawn.index(True), len(lines) - drawn[::-1].index(True)
        for kind, some in (("p", lines[:first]), ("pre", lines[first:last]), ("p", lines[last:])):
            if some:
                inner = linked(textwrap.dedent("\n".join(some)), scope)
                parts.append(f"<{kind}>{inner}</{kind}>")
    return "".join(parts)


def markdown(text):
    """Headings, code blocks, links, bold words and paragraphs; nothing else of Markdown."""
    parts = []
    for n, block in enumerate(re.split(r"```\w*\n(.*?)```", text, flags=re.S)):
        if n % 2:
            parts.append(f"<pre>{html.escape(block, quote=False)}</pre>")
            continue
        for paragraph in filter(None, (part.strip() for part in block.split("\n\n"))):
            heading = re.match(r"#+ (.*)", paragraph)
            inner = linked(heading[1] if heading else paragraph)
            inner = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", inner)
            inner = re.sub(r"\[(.+?)\]\((\S+?)\)", r'<a href="\2">\1</a>', inner)
            parts.append(f"<h3>{inner}</h3>" if heading else f"<p>{inner}</p>")
    return "".join(parts)


def painted(here):
    """(lines as HTML without comments, {line: (column, comment)}) of a Source."""
    marks, comments = defaultdict(list), {}
    for line, found in names_in(here).items():
        for first, last, full in found:
            if full not in here.places or here.places[full].lineno != line:
                marks[line].append((first, last, f'<a href="#{full}">', "</a>"))
    for token in tokenize.generate_tokens(io.StringIO(here.text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "COMMENT":
            comments[token.start[0]] = token.start[1], token.string
        elif keyword.iskeyword(token.string):
            marks[token.start[0]].append((token.start[1], token.end[1], "<b>", "</b>"))
        elif kind == "STRING" or kind.startswith("FSTRING"):
            for row in range(token.start[0], token.end[0] + 1):
                first = token.start[1] if row == token.start[0] else 0
                last = token.end[1] if row == token.end[0] else len(here.lines[row - 1])
                marks[row].append((first, last, "<s>", "</s>"))
    rows = []
    for number, text in enumerate(here.lines, 1):
        text = text[:comments.get(number, (len(text),))[0]].rstrip()
        row, at = "", 0
        for first, last, before, after in sorted(marks[number]):
            if first >= at:                             # nothing inside another mark
                row += html.escape(text[at:first]) + before + html.escape(text[first:last]) + after
                at = last
        rows.append(row + html.escape(text[at:]))
    return rows, comments
