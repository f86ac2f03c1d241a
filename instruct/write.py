"""instruct/write.py: answers become the samples of a LLaVA file; what became of the others is counted."""
from collections import Counter

import data
from formats.conversations import llava_row
from formats.files import write_json
from instruct.answerers import curate, describe_folder, generate_texts
from instruct.journal import Journal
from instruct.parsing import to_turns


def counted(reasons):
    """"3 empty, 1 cut off"."""
    return ", ".join(f"{n} {why}" for why, n in Counter(reasons).most_common())


def main(args):
    """Answers, then the samples in the order of the pictures, then what became of the others."""
    journal = Journal(args.out)
    with journal.file:
        said = {"caption": describe_folder, "curate": curate}.get(args.what, generate_texts)(args, journal)
    if said is None:                                    # only the cost was asked for
        return
    samples, dropped, taken = [], [], Counter()
    for job, text, lost in said:
        try:
            if lost:
                raise data.BadData(lost)
            turns = to_turns(args, job.name, text, taken)
            samples.append({**llava_row(job.image, turns), "id": job.name})
        except data.BadData as error:
            dropped.append({key: value.encode(errors="replace").decode() for key, value in
                            (("id", job.name), ("reason", str(error)), ("text", text))})
    why = counted(row["reason"] for row in dropped)
    write_json(f"{args.out}.dropped.json", dropped)
    if not samples:
        raise data.BadData(f"{args.out}: not written: none of {len(said)} can be used ({why})")
    write_json(args.out, samples)
    print(f"{args.out}: {len(samples):,} of {len(said):,} kept, {len(samples) / len(said):.1%}"
          + f"; dropped: {why}" * bool(dropped))
    if args.what == "curate":
        print("taken out of those kept:", counted(taken.elements()) or "nothing")
