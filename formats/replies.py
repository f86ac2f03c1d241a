"""What a language model writes around an answer: thinking, a code fence, a preamble, its own way of
marking question and answer. Read where it is clear what is meant; None where it is not.

    <think> ... </think>   Sure, here is the conversation:   ```   **Question 1:** ...   ```
"""
import re

_CLOSED = re.compile(r"<(think|thinking|thought|reasoning)>.*?</\1>", re.S | re.I)
_OPENS = re.compile(r"<(?:think|thinking|thought|reasoning)>", re.I)
_CLOSES = re.compile(r"</(?:think|thinking|thought|reasoning)>", re.I)
_FENCE = re.compile(r"^[ \t]*(?:`{3,}|~{3,})[ \t]*[\w+-]*[ \t]*$", re.M)
SPLIT = re.compile(r"^[ \t]*={3,}[ \t]*$", re.M)
_RULE = re.compile(r"[ \t]*(?:-{3,}|\*{3,}|_{3,})[ \t]*")
# "Question:", "**Question 1:** ...", "### Answer", "2. Q: ...", "“Answer”: ..."
_LABEL = re.compile(
    r"[ \t>]*(?:[-*+•][ \t]+)?(?P<head>\#{1,6})?[ \t]*(?P<bold>[*_]{1,3})?"
    r"(?:\(?\d{1,3}[.):][ \t]*(?P<bold2>[*_]{1,3})?)?(?P<quote>[\"“'‘])?"
    r"(?P<name>question|answer|q|a)(?P<number>[ \t]*\#?[ \t]*\(?\d{1,3}\)?)?"
    r"(?(quote)[\"”'’]?)(?P<close>[*_]{1,3})?[ \t]*(?P<sep>[:：.)–—-])?(?(quote)[\"”'’]?)"
    r"(?P<close2>[*_]{1,3})?[ \t]*(?P<rest>.*)", re.I)
_BEFORE = re.compile(
    r"\#{1,6}[ \t].{1,60}|[*_]{2,3}[^*_]{1,60}[*_]{2,3}:?|[A-Z][\w ]{0,40}:|"
    r"(?:sure|certainly|of course|okay|ok|absolutely|great|here (?:is|are)|here['’]s|"
    r"below (?:is|are)|the following|this is)\b.{0,200}[:.!]", re.I)
_AFTER = re.compile(r"(?:please )?(?:let me know|i hope|feel free|would you like|is there anything|"
                    r"if you(?:['’]d| would| need| want| have))\b", re.I)


def without_thinking(text):
    """The text behind the thinking; None if a thinking block does not end.

    Some servers' templates write the opening tag themselves, so the answer has the closing one."""
    text = _CLOSES.split(_CLOSED.sub("", text))[-1]
    return None if _OPENS.search(text) else text.strip()


def label(line):
    """("question" or "answer", the rest of the line) of a line that begins a block, or None."""
    found = _LABEL.fullmatch(line)
    if not found:
        return None
    name, sep, rest = found["name"].lower(), found["sep"] or "", found["rest"].strip()
    colon = sep in (":", "：") and bool(sep)
    numbered = found["number"] and (sep or not rest)
    marked = found["close"] and (found["bold"] or found["bold2"])           # **Question** ...
    if not (colon or numbered or len(name) > 1 and (marked or not rest)):
        return None
    open_bold = (found["bold"] or found["bold2"]) and not (found["close"] or found["close2"])
    if open_bold and rest.endswith("*"):                # **Question: What is it?**
        rest = rest.rstrip("*").rstrip()
    return {"q": "question", "a": "answer"}[name[0]], rest


def unfenced(text):
    """The inside of the one code fence of a reply whose blocks all stand in it; else the text."""
    parts = _FENCE.split(text)
    lines = text.split("\n")
    if len(parts) == 3:
        outside = f"{parts[0]}\n{parts[2]}"
        if parts[1].strip() and not SPLIT.search(outside) and not any(
                map(label, outside.split("\n"))):
            return parts[1].strip()
    if len(parts) == 2 and _FENCE.fullmatch(lines[0]):                      # it never ends
        return parts[1].strip()
    return text


def _is_preamble(lines):
    return all(not line or _BEFORE.fullmatch(line) or _RULE.fullmatch(line)
               for line in map(str.strip, lines))


def description(text):
    """A description without a fence and without a line such as "Here is the description:"; None if
    something else stands around it."""
    parts = _FENCE.split(text)
    if len(parts) == 3 and not parts[2].strip() and parts[1].strip() and _is_preamble(
            parts[0].split("\n")):
        return description(parts[1].strip())
    if len(parts) > 1:
        return None
    first, _, rest = text.partition("\n")
    bare = first.strip().strip("#*_ ")
    if rest.strip() and (bare.endswith(":") and _BEFORE.fullmatch(bare) or re.fullmatch(
            "(?:detailed |image )?(?:description|answer|paragraph)", bare, re.I)):
        return rest.strip()
    return text


def questions_and_answers(text):
    """[question, answer, ...] of a reply with blocks that begin with a label, with or without lines
    of === around them; None where it is not clear which text belongs to which block.

    Without any === a question must end in a question mark: else an answer that happens to hold
    "Answer:" could be taken apart."""
    ruled, before, blocks, closed = bool(SPLIT.search(text)), [], [], False
    for line in text.split("\n"):
        if SPLIT.fullmatch(line):
            closed = bool(blocks) and bool(blocks[-1][1].strip())
            continue
        if begins := label(line):
            blocks.append([*begins])
            closed = False
        elif not blocks:
            before.append(line)
        elif closed and line.strip() and not _RULE.fullmatch(line):
            return None                                 # a text behind the end of its block
        else:
            blocks[-1][1] += f"\n{line}"
    texts = [re.sub(rf"(?:\n\s*{_RULE.pattern})+\s*$", "", f"\n{text}").strip()
             for _, text in blocks]
    names = [name for name, _ in blocks]
    if not blocks or len(names) % 2 or names != ["question", "answer"] * (len(names) // 2) or not (
            all(texts) and _is_preamble(before)):
        return None
    are_questions = all(text.rstrip("\"”'’*_) ").endswith("?") for text in texts[::2])
    if not ruled and not are_questions or _AFTER.match(texts[-1].split("\n")[-1].strip()):
        return None
    return texts
