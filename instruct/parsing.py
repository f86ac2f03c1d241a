"""instruct.parsing: what a model wrote becomes the turns of a sample, or a reason to drop it.

    conversation, reasoning   blocks of question and answer --parse_reply--> turns
    detail                    a paragraph                   --parse_reply--> one description
    curate                    a description --repaired_or_reject--> a clean one, [MiniGPT-4] 3.2
    caption                   taken as it is, unless a control token is in it

Reasons are few and fixed, so that they can be counted. A doubtful reply is dropped: a sample less
costs little, and a wrong one is learned.
"""
import random
import re
from collections import Counter

import data
from formats import replies
from formats.conversations import MINIGPT4_INSTRUCTIONS
from formats.strict_json import is_broken_text
from toy.texts import DESCRIBE

CONTROL = re.compile(r"</?s>|###|<image>|<unk>|<\|\w+\|>|\[/?INST\]", re.I)
# Some of these are true answers, about the caption under a cartoon: better one too few.
MENTIONS_SOURCE = re.compile(
    r"\b(captions?|bounding box(es)?|coordinates)\b|\[\s*[01]?\.\d+\s*,", re.I)
APOLOGY = re.compile(
    r"\bi( a|')m (\w+ )?sorry\b|\bi apologi[sz]e|\bmy apologies\b|\bmade a mistake\b"
    r"|\bas an ai\b", re.I)


# ----------------------------------------------------------- conversation, detail, reasoning

def parse_detail(reply):
    """[description]."""
    if replies.SPLIT.search(reply):
        raise data.BadData("blocks in a description")
    text = replies.description(reply)
    if text is None:
        raise data.BadData("a code fence in a description")
    return [text]


def parse_blocks(reply):
    """[question, answer, ...]: in the form that was asked for, or in one that is as clear."""
    parts = [part.strip() for part in replies.SPLIT.split(reply)]
    has_rules = len(parts) > 1                          # lines of ===
    if not parts[0]:                                    # one may open the whole
        parts = parts[1:]
    if parts and not parts[-1]:                         # and one may close it
        parts = parts[:-1]
    labels = [replies.label(part) for part in parts[::2]]
    wanted = [("question", ""), ("answer", "")] * (len(parts) // 4)
    if has_rules and len(parts) % 4 == 0 and labels == wanted:
        if not all(parts):
            raise data.BadData("an empty block")
        return parts[1::2]
    turns = replies.questions_and_answers(reply)
    if turns:
        return turns
    if has_rules:
        raise data.BadData("blocks are not question and answer by turns")
    raise data.BadData("no === blocks")


def parse_reply(kind, reply):
    """The turns of an answer: [question, answer, ...]; for detail, [description].

    Raises data.BadData with the reason."""
    reply = reply.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    reply = replies.without_thinking(reply)
    if reply is None:
        raise data.BadData("thinking that does not end")
    if not reply:
        raise data.BadData("empty")
    if is_broken_text(reply):
        raise data.BadData("not Unicode text")
    if kind == "detail":
        turns = parse_detail(reply)
    else:
        turns = parse_blocks(replies.unfenced(reply))
    if any(CONTROL.search(turn) for turn in turns):
        raise data.BadData("holds a control token")
    if any(MENTIONS_SOURCE.search(turn) for turn in turns):
        raise data.BadData("speaks of captions or boxes")
    if kind == "reasoning" and len(turns) != 2:
        raise data.BadData("more than one question")
    return turns


# ---------------------------------------------------------------------------------- curation

def repair_by_rules(text):
    """(text, Counter of what was taken out): MiniGPT-4's clean-up by rules instead of ChatGPT.

    The rules are crude: "Mr." at the head of a sentence is a fragment, and goes."""
    removed, kept, known = Counter(), [], set()
    clean = re.sub(r"[^\w\s]{4,}|##+|[\x00-\x08\x0b-\x1f\x7f\ufffd]+", " ", text)
    removed["runs of signs"] = clean != text
    for piece in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+|\n+", clean):
        piece = " ".join(piece.split())
        letters = sum(c.isascii() and c.isalpha() for c in piece)
        bare = "".join(c for c in piece.lower() if c.isalnum())
        ends = piece.rstrip("\"')")[-1:] in (".", "!", "?")
        if not piece:
            continue
        if 2 * letters < len(piece.replace(" ", "")):
            removed["not English letters"] += 1
        elif not ends or len(piece.split()) < 2:
            removed["fragments"] += 1
        elif bare in known:
            removed["repeated sentences"] += 1
        else:
            kept.append(piece)
            known.add(bare)
    return " ".join(kept), +removed                     # +: without those that are 0


def reason_to_drop(text, repaired, min_words):
    """Why a description is dropped, or "". An apology counts wherever it stands."""
    if is_broken_text(text):
        return "not Unicode text"
    if APOLOGY.search(text.replace("’", "'")):
        return "an apology"
    if not repaired:
        return "nothing left"
    if CONTROL.search(repaired):
        return "holds a control token"
    if len(repaired.split()) < min_words:
        return f"fewer than {min_words} words"
    return ""


def repaired_or_reject(text, min_words):
    """`repair_by_rules`, or data.BadData with why the text is dropped."""
    repaired, removed = repair_by_rules(text)
    reason = reason_to_drop(text, repaired, min_words)
    if reason:
        raise data.BadData(reason)
    return repaired, removed


def to_turns(args, name, text, removed):
    """The turns of a sample, the person's first. Raises data.BadData with why it is dropped.

    removed: Counter to which curation adds what it took out."""
    if args.what == "caption":
        if CONTROL.search(text):
            raise data.BadData("holds a control token")
        return [args.prompt, text]
    if args.what in ("conversation", "reasoning"):
        return parse_reply(args.what, text)
    rng = random.Random(f"{args.seed}:{name}")          # the question is drawn, as in the papers
    if args.what == "detail":
        return [rng.choice(DESCRIBE), *parse_reply("detail", text)]
    if args.endpoint:
        text = replies.without_thinking(text)
        if text is None:
            raise data.BadData("thinking that does not end")
    repaired, counts = repaired_or_reject(text, args.min_words)
    removed += counts
    return [rng.choice(MINIGPT4_INSTRUCTIONS), repaired]
