"""instruct: make and curate the text that models like these are trained on.

    captions_*.json --+                                       +-- an endpoint's model
    instances_*.json -+- what is known of a picture, as text -+-- the local LLaMA       none of them
    --toy N (world) --+                                       +-- the toy world itself  sees it
                                                              |
    photos/ --- a model that sees --- writes               answers --- OUT.answers.jsonl
                                       |                      |        a line each, fsynced
         curate: continue, repair, keep or drop        parse or reject
                                       |                      |
                                       +--- LLaVA JSON: OUT --+        whole or not at all

Three ideas. LLaVA: a model that never saw the picture can write a conversation about it from five
captions and the boxes of its objects. MiniGPT-4: a few thousand clean descriptions repair a model
that repeats itself and breaks off; they are described, continued where they are short, repaired or
dropped. ShareGPT4V: a captioner trained on a few good descriptions writes the rest.

    python -m instruct conversation --captions C.json --images DIR --endpoint URL ... --out OUT
    python -m instruct detail --toy 1000 --images DIR --out OUT         the world is the oracle
    python -m instruct caption PHOTOS --model FOLDER --out OUT
    python -m instruct curate PHOTOS --model FOLDER --out OUT           or a LLaVA JSON, no --model
    python -m instruct scienceqa FOLDER --out OUT       ScienceQA's problems; nobody is asked

Every answer is kept under a hash of all that it depends on. A run that was killed is resumed from
there, --limit 1000 after --limit 10 asks 990 more, and another seed asks anew.
The prompts are in our own words, because the papers' sentences are not ours to copy.
Left out: pictures sent to an endpoint (ShareGPT4V's first 100,000 came from GPT4-V that way).
[LLaVA] 2304.08485 section 3.  [MiniGPT-4] 2304.10592 section 3.2.  [ShareGPT4V] 2311.12793.
Next: train.py --data OUT --images DIR, which learns from it.
"""
import os
import sys

from instruct.flags import parse

if __name__ == "__main__":
    args = parse()                      # before torch is imported: --help answers at once
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from formats.errors import exit_status
    if args.what == "scienceqa":        # no model, no torch
        from instruct.scienceqa import main
    else:
        from instruct.write import main
    sys.exit(exit_status(lambda: main(args), args.debug))
