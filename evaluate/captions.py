"""evaluate.captions: a model describes pictures, CIDEr-D compares with what people wrote.

    COCO Karpathy, NoCaps --karpathy.read_pictures--> pictures --answers_to_file--> OUT
    OUT.results.json: [{image_id, caption}], which the official tools and servers take
    --cider.cider_d--> CIDEr-D, of NoCaps by domain

BLIP-2 is given the beginning "a photo of", which its captions go on from, 5 beams and 30 tokens;
officially its answers have at least 8 tokens, which is not asked for here. Other models are asked.
"""
from evaluate.benchmarks import answers_to_file
from evaluate.cider import cider_d
from evaluate.karpathy import read_pictures
from evaluate.vqa import published_settings
from formats.files import write_json

PROMPTS = {"blip2_opt": "a photo of", "blip2_t5": "a photo of"}
ASKED = "Provide a one-sentence caption for the provided image."


def caption(args):
    """Print CIDEr-D of the pictures of a file; papers print it times 100, and so do we."""
    published_settings(args, PROMPTS, ASKED, 1.0)
    pictures = read_pictures(args.references, args.images, args.split)
    for picture in pictures:
        picture["text"] = args.prompt
    pairs, left_out = answers_to_file(args, pictures)
    write_json(f"{args.out}.results.json",
               [{"image_id": q["id"], "caption": row["text"]} for q, row in pairs])
    # document frequencies are those of all pictures that were described, whatever their domain
    scores = cider_d([row["text"] for _, row in pairs], [q["captions"] for q, _ in pairs])
    groups = {}
    for (q, _), score in zip(pairs, scores):
        for group in ("all", q["domain"]):
            if group is not None:
                groups.setdefault(group, []).append(score)
    figures = {"prompt": args.prompt, "left out": len(left_out), "CIDEr-D": {}}
    print(f"CIDEr-D, {args.prompt!r}")
    for group, some in sorted(groups.items()):
        figures["CIDEr-D"][group] = {"score": 100 * sum(some) / len(some), "pictures": len(some)}
        print(f"  {group:<14}{figures['CIDEr-D'][group]['score']:8.2f} of {len(some):,} pictures")
    if len(pairs) == 1:
        print("  of one picture alone CIDEr-D is 0: no word is rarer than another")
    if left_out:
        print(f"  {len(left_out)} picture(s) could not be described and are in no figure")
    return figures
