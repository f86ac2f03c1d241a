"""docs/build.py: the code as a book, in one file for the browser.

    python docs/build.py             write docs/book.html (`make book` does the same)
    python docs/build.py --relink    correct the line numbers in docs/questions.md

The seven files and the attention essay stand in reading order: on the left docstrings and comments,
on the right the code, between them the shapes (short comments at the ends of lines). A name links
to its definition (docs/links.py), which may stand in the last chapter, "The rooms". Pictures and
exercises come from docs/beside.py. The frame is docs/page.html, which also explains the words that
the chapters take for granted; the look is docs/book.css. No package is needed, and no model is
imported. A broken link, two places of one name or a book over MOST_BYTES end the build with one
line.
"""

import argparse
import ast
import html
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))       # python docs/build.py puts docs/ there, not the folder above

from docs.beside import exercises, figures, lists, tries
from docs.links import DEFINES, module_of, read, resolve, source
from docs.markup import is_wide, linked, markdown, painted, prose

MOST_BYTES = 3_000_000
SHAPE = 30                          # letters of the longest comment that stands beside its line
CHAPTERS = {    # module -> its chapter in one sentence, for readers of Korean
    "clip": "이미지를 한 줄로 늘어놓은 패치 벡터 시퀀스로 바꿉니다. LLaVA가 왜 끝에서 두 번째 블록을 읽는지도 설명합니다.",
    "llama": "토큰 id뿐 아니라 임베딩도 입력으로 받는 디코더와 그 KV 캐시를 다룹니다.",
    "projector": "패치 벡터를 언어 모델의 폭에 맞추어 텍스트 임베딩 사이에 끼워 넣습니다.",
    "data": "대화를 id와 라벨로, 사진을 픽셀로, 샘플을 배치로 바꾸고, 어느 토큰에 손실을 걸지 정합니다.",
    "train": "하나의 루프로 모든 레시피의 모든 단계를 학습하며, 무엇을 언제 동결하는지 보여 줍니다.",
    "generate": "프롬프트를 한 번에 읽은 뒤(prefill) 토큰을 하나씩 만들어 냅니다(decode).",
    "qformer": "학습된 쿼리 32개로 이미지에 질문하는 Q-Former, 그 마스크 세 개와 손실 세 개를 다룹니다.",
    "kernels.attention": "점수 행렬을 만들지 않고 타일 단위로 어텐션을 계산하는 FlashAttention을 풀어 씁니다."}
ENDS = {"kernels.attention": "compile_cases"}       # from there on that file serves its tests


# --------------------------------------------------------------------------------- the chapters

def events(here, comments):
    """What a chapter is made of, in the order of the lines: (kind, line, what it says)."""
    starts, skip = {}, set()                            # skip: the lines of docstrings
    for full, node in {"": here.tree, **here.places}.items():
        if isinstance(node, DEFINES):
            starts[min([node.lineno, *(d.lineno for d in node.decorator_list)])] = full
        if isinstance(node, (ast.Module, *DEFINES)) and ast.get_docstring(node):
            skip.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    said, stop, most = [], 0, SHAPE
    for number, text in enumerate(here.lines, 1):
        column, comment = comments.get(number, (0, ""))
        alone = comment and not text[:column].strip()
        if said and not alone:                          # a group of comments ends
            yield "note", number - len(said), "\n".join(said)
            said = []
        if number in starts:
            full, node = starts[number], here.places[starts[number]]
            if full.endswith("." + ENDS.get(here.module, " ")):
                return
            stop = max(stop, node.end_lineno)
            fields = any(isinstance(part, ast.AnnAssign) for part in node.body)
            most = 99 if fields else SHAPE              # each field keeps its comment beside it
            yield "fields" if fields else "definition", number, full
        elif number == stop + 1:
            yield "end", number, ""                     # what follows is no part of a definition
        if alone and (rule := re.match(r"# -{9,} ?(.*)", comment)):
            yield "section", number, rule[1]
        elif alone:
            said.append(comment.removeprefix("#").removeprefix(" "))
        elif number not in skip:
            comment = "" if comment.startswith("# noqa") else comment.removeprefix("# ")
            if len(comment) > most:
                yield "note", number, comment
                comment = ""
            yield "code", number, comment


def chapter(module):
    """(HTML of a file, [(place, title)] of its sections and definitions)."""
    here = source(module)
    rows, comments = painted(here)
    ids = [""] * (len(rows) + 1)
    for full, node in here.places.items():
        if not isinstance(node, DEFINES):
            ids[node.lineno] += f'<a id="{full}"></a>'
    out = [f"<div class=open>{prose(ast.get_docstring(here.tree), module)}</div><div class=def>"]
    contents, scope, gap, was = [], module, "", ""
    for kind, line, said in events(here, comments):
        if kind == "section":
            out.append(f'</div><h3 id="{module}-{line}">{said}</h3><div class=def>')
            contents.append((f"{module}-{line}", f"<b>{said}</b>"))
        elif kind == "end":
            out.append("</div><div class=def>")
            scope = module
        elif kind in ("definition", "fields"):
            scope, title = said, said.removeprefix(f"{module}.")
            doc = prose(ast.get_docstring(here.places[said]), said)
            doc = (f'<aside class="doc{is_wide(doc)}"><h4><a href="#{said}">{title}</a></h4>{doc}'
                   f"{tries(said)}</aside>")
            if shown := figures(said):      # a picture stands beside the text, above the code
                doc = f'<div class="lead">{doc}<div>{shown}</div></div>'
            out.append(f'</div><div class="def {kind}" id="{said}">{doc}')
            if "." not in title:
                contents.append((said, title))
        elif kind == "note":
            text = prose(said, scope)
            out.append(f'<aside class="note{is_wide(text)}"><em>{line}</em>{text}</aside>')
        elif rows[line - 1]:
            space = len(here.lines[line - 1]) - len(here.lines[line - 1].lstrip())
            code = f"<u>{' ' * space}</u>{rows[line - 1][space:]}"
            out.append(f'<div class="l{gap}" id="{module}-{line}" style="--i:{space}">{ids[line]}'
                       f"<i>{linked(said, scope)}</i><em>{line}</em><code>{code}</code></div>")
        # an empty line between two lines of code is a gap above the second
        gap = " gap" if kind == "code" and not rows[line - 1] and was == "code" else ""
        was = kind
    return "".join(out) + "</div>", contents


def entry(full):
    """A definition of a room: what it says of itself, and its first lines."""
    here = source(module_of(full))
    node = here.places.get(full, here.tree)
    doc = prose(ast.get_docstring(node) if isinstance(node, (ast.Module, *DEFINES)) else "", full)
    if full == here.module:
        return f"<div class=open>{doc}</div>"
    last = node.body[0].lineno - 1 if isinstance(node, DEFINES) else node.end_lineno
    code = html.escape("\n".join(here.lines[node.lineno - 1:min(last, node.lineno + 5)]))
    head = f"<h4>{full.removeprefix(here.module + '.')}</h4>"
    return (f'<div class=def id="{full}"><aside class="doc{is_wide(doc)}">{head}{doc}</aside>'
            f"<pre>{code}</pre></div>")


def rooms(text):
    """The last chapter: every definition that `text` links to and that has no place in it."""
    places, entries = {*re.findall(r'id="([^"]+)"', text)}, {}
    while more := {*re.findall(r'href="#([\w.]+)"', text)} - places - entries.keys():
        entries |= {full: entry(full) for full in more if resolve(full)}
        places |= more                      # a name that nothing defines is found by `faults`
        text = "".join(entries.values())    # the entries link to others
    out = ""
    for module in sorted({module_of(full) for full in entries}):
        out += f'<h3 id="{module}">{source(module).path}</h3>'
        out += "".join(entries[full] for full in sorted(entries) if module_of(full) == module)
    return out


def questions(text):
    """docs/questions.md as a chapter; lines of the other chapters are linked inside the book."""
    text = markdown(text)
    for module in CHAPTERS:
        text = re.sub(rf'"\.\./{module.replace(".", "/")}\.py#L(\d+)"', rf'"#{module}-\1"', text)
    return text


def relink(text):
    """The page with the present line numbers of the code that its links quote."""
    def moved(match):
        found = [n for n, line in enumerate(read(match[2]).split("\n"), 1) if match[1] in line]
        if len(found) != 1:
            sys.exit(f"docs/questions.md: {match[1]!r} is in {len(found)} lines of {match[2]}; "
                     "quote a piece of code that is in one")
        return f"[`{match[1]}`](../{match[2]}#L{found[0]})"
    return re.sub(r"\[`([^`]+)`\]\(\.\./([\w/]+\.py)#L\d+\)", moved, text)


def faults(text):
    """What is wrong with the book: links to nowhere, places of the same name, things to load."""
    ids = re.findall(r'\bid="([^"]+)"', text)
    found = [f"two places of the name {name}" for name in sorted({*ids}) if ids.count(name) > 1]
    for link in sorted({*re.findall(r'href="([^"]*)"', text)}):
        ok = (ROOT / "docs" / link.split("#")[0]).exists()
        if link.startswith("#"):
            ok = link[1:] in {*ids}
        elif link.startswith("https://"):
            ok = re.match(r"https://(arxiv\.org/abs/\d|github\.com/[\w./-]+/\d+$)", link)
        found += [] if ok else [f"a link to nowhere: {link}"]
    if re.search(r"src=(?!\"data:)|<link|<script|@import|url\(", text):
        found.append("the book would load something")
    if (size := len(text.encode())) > MOST_BYTES:
        found.append(f"{size:,} bytes, the most is {MOST_BYTES:,}")
    return found


def turned(page):
    """Each chapter with links to the one before and behind it.

    The place of a chapter is its section: a header that sticks to the screen has no fixed one."""
    heads = re.findall(r'<section[^>]* id="([^"]+)"><header><h2>(.*?)</h2></header>', page)
    for n, (place, title) in enumerate(heads):
        ways, nearby = [], []
        if n:
            ways.append(f'<a href="#{heads[n - 1][0]}" title="{heads[n - 1][1]}">previous</a>')
        ways.append('<a href="#top">contents</a>')
        if n + 1 < len(heads):
            after, name = heads[n + 1]
            ways.append(f'<a href="#{after}" title="{name}">next</a>')
            nearby.append(f'<p class="next">Next: <a href="#{after}">{name}</a></p>')
        before, behind = page.split(f"<header><h2>{title}</h2></header>")
        body, rest = behind.split("</section>", 1)
        page = (f'{before}<header><nav>{" · ".join(ways)}</nav><h2>{title}</h2>'
                f"</header>{body}{''.join(nearby)}</section>{rest}")
    return page


def book():
    """The whole page."""
    body, contents = "", ""
    for n, (module, korean) in enumerate(CHAPTERS.items(), 1):
        inner, found = chapter(module)
        title, idea = ast.get_docstring(source(module).tree).split("\n")[0].split(": ", 1)
        links = " · ".join(f'<a href="#{place}">{name}</a>' for place, name in found)
        contents += (f'<li value="{n}"><a href="#{module}"><b>{title}</b></a>: {idea}'
                     f'<p lang="ko">{korean}</p><p class="names">{links}</p></li>\n')
        body += (f'<section id="{module}"><header><h2>{n}. {title}</h2></header>'
                 f"{inner}</section>\n")
    path = re.search(r"^## The whole path\n(.*?)^## ", read("README.md"), re.S | re.M)[1]
    page, asked = read("docs/page.html"), questions(read("docs/questions.md"))
    for name, part in (("{STYLE}", read("docs/book.css")), ("{CONTENTS}", contents),
                       ("{PATH}", markdown(path)), ("{EXERCISES}", exercises()),
                       ("{CHAPTERS}", body), ("{QUESTIONS}", asked), *lists(asked).items()):
        page = page.replace(name, part)
    last = rooms(page)
    names = " · ".join(f'<a href="#{module}">{path}</a>'
                       for module, path in re.findall(r'<h3 id="([\w.]+)">(.*?)</h3>', last))
    return turned(page.replace("{ROOMS}", last).replace("{ROOM_LIST}", names))


def main():
    parser = argparse.ArgumentParser(description="Write docs/book.html.", allow_abbrev=False)
    parser.add_argument("--relink", action="store_true", help="correct docs/questions.md instead")
    if parser.parse_args().relink:
        text = relink(read("docs/questions.md"))
        return (ROOT / "docs/questions.md").write_text(text, encoding="utf-8")
    text = book()
    if found := faults(text):
        sys.exit("docs/build.py: " + "; ".join(found))
    (ROOT / "docs/book.html").write_text(text, encoding="utf-8")
    print(f"docs/book.html: {len(text.encode()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
