"""docs/markup.py: docstrings, comments, code and our Markdown pages as HTML.

    linked     a line of text, with `names` as links to their definitions
    prose      a docstring: paragraphs, and what is drawn with spaces as it stands
    markdown   a page of docs/, as far as our pages use Markdown
    is_wide    does a drawing need more room than the column on the left?
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
PAGE = r'(?<![\w/">])docs/(\w+\.md)'     # docs/results.md, as it is named in a text
STRESS = r"(?<![\w*)\]])\*([A-Za-z][\w -]*)\*(?![\w*])"      # *before*, but not B*(T-1) or 2 * x
LABEL = r"\n(?=(?:Letters|Alone|Next|Left out|Checked against)\b)"    # lines that begin a paragraph
NARROW = 44                             # letters of a drawing's line that fit into the left column


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
    text = re.sub(PAGE, r'<a href="\1">docs/\1</a>', text)
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
        parts += paragraphs(lines[:first], scope)
        if lines[first:last]:
            drawing = textwrap.dedent("\n".join(lines[first:last]))
            parts.append(f"<pre>{linked(drawing, scope)}</pre>")
        parts += paragraphs(lines[last:], scope)
    return "".join(parts)


def paragraphs(lines, scope=""):
    """Lines as <p>; "Letters:", "Alone:", "Next:" and the like begin one of their own."""
    return [f"<p>{stressed(linked(part, scope))}</p>"
            for part in re.split(LABEL, "\n".join(lines)) if part]


def stressed(text):
    """*before* in italics."""
    return re.sub(STRESS, r"<i>\1</i>", text)


def is_wide(text):
    """" wide", a class, for HTML with a drawing that does not fit beside code; else ""."""
    drawn = "\n".join(re.findall(r"<pre>(.*?)</pre>", text, re.S))
    bare = html.unescape(re.sub(r"<[^>]+>", "", drawn))
    return " wide" if max(map(len, bare.split("\n"))) > NARROW else ""


def markdown(text):
    """Headings, code blocks, tables, links, bold words and paragraphs; nothing else of Markdown.

    The lines below a heading are the same in Korean. A heading "7. What ..." is question-7."""
    parts = []
    for n, block in enumerate(re.split(r"```\w*\n(.*?)```", text, flags=re.S)):
        if n % 2:
            parts.append(f"<pre>{linked(block)}</pre>")
            continue
        for paragraph in filter(None, (part.strip() for part in block.split("\n\n"))):
            if paragraph.startswith("|"):
                parts.append(table(paragraph))
            elif heading := re.match(r"#+ (?:(\d+)\.)?(.*)\n?(.*)", paragraph):
                number, title, korean = heading.groups()
                place = f' id="question-{number}"' if number else ""
                title = f"{number}.{title}" if number else title
                parts.append(f"<h3{place}>{inline(title.strip())}</h3>")
                parts.append(f'<p lang="ko">{korean}</p>' if korean else "")
            else:
                parts.append(f"<p>{inline(paragraph)}</p>")
    return "".join(parts)


def inline(text):
    """Names, bold and stressed words and links of a line of Markdown."""
    # a link keeps the words that its author gave it
    whole = re.split(r"(\[(?:`[^`]+`|[^\]`])+\]\(\S+?\))", text)
    for n, part in enumerate(whole):
        if n % 2:
            words, href = re.match(r"\[(.+)\]\((\S+?)\)$", part, re.S).groups()
            words = re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(words, quote=False))
            whole[n] = f'<a href="{href}">{words}</a>'
        else:
            whole[n] = stressed(re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", linked(part)))
    return "".join(whole)


def table(text):
    """Lines of | cells |; the first is the head, the second the rule below it."""
    rows = [[inline(cell.strip()) for cell in line.strip("| ").split("|")]
            for line in text.split("\n")]
    out = "".join(f"<th>{cell}</th>" for cell in rows[0])
    for row in rows[2:]:
        out += "</tr><tr>" + "".join(f"<td>{cell}</td>" for cell in row)
    return f"<table><tr>{out}</tr></table>"


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
