"""instruct.write: answers become the samples of a LLaVA file; the others are counted, with reasons.

OUT gets the samples in the order of the pictures, OUT.dropped.json the rest: id, reason, text.
"""
from collections import Counter

import data
from formats.files import write_json
from formats.llava_rows import llava_row
from instruct.answerers import curate, describe_folder, generate_texts
from instruct.journal import Journal
from instruct.parsing import to_turns


def counted(reasons):
    """"3 empty, 1 cut off"."""
    return ", ".join(f"{n} {why}" for why, n in Counter(reasons).most_common())


def valid_utf8(text):
    """The text with "?" for what UTF-8 cannot hold: a file's name, half a surrogate pair."""
    return text.encode(errors="replace").decode()


def main(args):
    """Get the answers, write the samples, print what became of the others."""
    answer = {"caption": describe_folder, "curate": curate}.get(args.what, generate_texts)
    journal = Journal(args.out)
    with journal.file:
        replies = answer(args, journal)
    if replies is None:                                 # only the cost was asked for
        return
    samples, dropped, removed = [], [], Counter()
    for job, text, reason in replies:
        try:
            if reason:
                raise data.BadData(reason)
            turns = to_turns(args, job.name, text, removed)
            samples.append({**llava_row(job.image, turns), "id": job.name})
        except data.BadData as error:
            dropped.append({"id": valid_utf8(job.name), "reason": valid_utf8(str(error)),
                            "text": valid_utf8(text)})
    why = counted(row["reason"] for row in dropped)
    write_json(f"{args.out}.dropped.json", dropped)
    if not samples:
        raise data.BadData(f"{args.out}: not written: none of {len(replies)} can be used ({why})")
    write_json(args.out, samples)
    line = (f"{args.out}: {len(samples):,} of {len(replies):,} kept, "
            f"{len(samples) / len(replies):.1%}")
    print(f"{line}; dropped: {why}" if dropped else line)
    if args.what == "curate":
        print("taken out of those kept:", counted(removed.elements()) or "nothing")
