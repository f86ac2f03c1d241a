"""TODO"""

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
MENTIONS_SOURCE = re.compile(r"\b(captions?|bounding box(es)?|coordinates)\b|\[\s*[01]?\.\d+\s*,", re.I)


def parse_reply(kind, reply):
    """The turns of an answer: [question, answer, ...]; for detail, [description].

    Raises data.BadData with the reason, one of a few, so that reasons can be counted."""
    reply = reply.lstrip("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    reply = replies.without_thinking(reply)
    if reply is None:
        raise data.BadData("thinking that does not end")
    if not reply:
        raise data.BadData("empty")
    if is_broken_text(reply):
        raise data.BadData("not Unicode text")
    turns = parse_detail(reply) if kind == "detail" else parse_blocks(replies.unfenced(reply))
    if any(map(CONTROL.search, turns)):
        raise data.BadData("holds a control token")
    if any(map(MENTIONS_SOURCE.search, turns)):
        raise data.BadData("speaks of captions or boxes")
    if kind == "reasoning" and len(turns) != 2:
        raise data.BadData("more than one question")
    return turns


APOLOGY = re.compile(r"\bi( a|')m (\w+ )?sorry\b|\bi apologi[sz]e|\bmy apologies\b|\bmade a mistake\b"
                   r"|\bas an ai\b", re.I)


def repair_by_rules(text):
    """(text, Counter of what was taken out): MiniGPT-4's clean-up by rules instead of ChatGPT.

    Crude where English is: "Mr." at the head of a sentence is a fragment, and goes."""
    out, kept, seen = Counter(), [], set()
    clean = re.sub(r"[^\w\s]{4,}|##+|[\x00-\x08\x0b-\x1f\x7f\ufffd]+", " ", text)
    out["runs of signs"] = clean != text
    for piece in re.split(r"(?<=[.!?])\s+|(?<=[.!?][\"')])\s+|\n+", clean):
        piece = " ".join(piece.split())
        letters = sum(c.isascii() and c.isalpha() for c in piece)
        bare = "".join(c for c in piece.lower() if c.isalnum())
        if not piece:
            continue
        if 2 * letters < len(piece.replace(" ", "")):
            out["not English letters"] += 1
        elif not piece.rstrip("\"')")[-1:] in (".", "!", "?") or len(piece.split()) < 2:
            out["fragments"] += 1
        elif bare in seen:
            out["repeated sentences"] += 1
        else:
            kept.append(piece)
            seen.add(bare)
    return " ".join(kept), +out


def repaired_or_reject(said, min_words):
    """`repair`, or data.BadData with why the text is dropped. An apology counts wherever it is."""
    text, out = repair_by_rules(said)
    reason = ("not Unicode text" if is_broken_text(said) else
              "an apology" if APOLOGY.search(said.replace("’", "'")) else
              "nothing left" if not text else
              "holds a control token" if CONTROL.search(text) else
              f"fewer than {min_words} words" if len(text.split()) < min_words else "")
    if reason:
        raise data.BadData(reason)
    return text, out


def to_turns(args, name, text, taken):
    """What a sample says: question, answer, ... Raises data.BadData with why it is rejected."""
    if args.what == "caption":
        if CONTROL.search(text):
            raise data.BadData("holds a control token")
        return [args.prompt, text]
    if args.what in ("conversation", "reasoning"):
        return parse_reply(args.what, text)
    dice = random.Random(f"{args.seed}:{name}")         # the question is drawn, as in the papers
    if args.what == "detail":
        return [dice.choice(DESCRIBE), *parse_reply("detail", text)]
    if args.endpoint and (text := replies.without_thinking(text)) is None:
        raise data.BadData("thinking that does not end")
    text, out = repaired_or_reject(text, args.min_words)
    taken += out
    return [dice.choice(MINIGPT4_INSTRUCTIONS), text]


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
    parts = [x.strip() for x in replies.SPLIT.split(reply)]
    ruled = len(parts) > 1
    parts = parts[not parts[0]:len(parts) - (not parts[-1])]    # a === may open and close the whole
    names = [replies.label(x) for x in parts[::2]]
    if ruled and not len(parts) % 4 and names == [("question", ""), ("answer", "")] * (
            len(parts) // 4):
        if not all(parts):
            raise data.BadData("an empty block")
        return parts[1::2]
    if turns := replies.questions_and_answers(reply):
        return turns
    raise data.BadData("blocks are not question and answer by turns" if ruled else "no === blocks")
