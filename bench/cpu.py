"""bench/cpu.py: the toy on one core, beside transformers, in turns."""

import copy
import gc
import math
import statistics
import tempfile
import time
from functools import partial

import torch
import torch.nn.functional as F

from bench.kernels import ROOT
from decoding.loading import prepare_for_inference
from toy.texts import description, training_sample
from toy.world import make_scene


def pair_of(model, *more):
    """Ours, and transformers' LLaVA with the same weights in fp32, and in each of `more`."""
    from transformers import LlavaForConditionalGeneration
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, *(LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
                        for dtype in (torch.float32, *more))


def small_llava(deep):
    """160M random weights, 256 patches: the language model of LLaMA-160M's proportions, or (deep)
    SmolLM2-135M's: 30 narrow layers, 9 heads for 3 key heads."""
    import clip
    import data
    import llama
    import projector
    size = (dict(vocab=49152, width=576, depth=30, heads=9, kv_heads=3, mlp=1536, tied=True) if deep
            else dict(vocab=32000, width=768, depth=12, heads=12, kv_heads=12, mlp=2048))
    eye = clip.ViT(clip.Config(width=512, depth=8, heads=8, mlp=2048, image_size=224, patch_size=14))
    model = projector.VLM(eye, "mlp", llama.Llama(llama.Config(**size)),
                          data.Tokenizer(ROOT / "toy/weights/llama"))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:             # loud enough that rounding decides no token
                p.normal_(0, p.shape[-1] ** -.5)
        model.llm.embed.weight.normal_()
    return model.eval()


def written(generate, model, ids, pixels, new):
    """Tokens (B, new) of ours, and the second at which each column was there."""
    times, rows = [], [[] for _ in pixels]
    for step in generate.generate_rows(model, [ids] * len(rows), list(pixels[:, None]), new, eos=-1):
        if any(step):                   # the last has nothing left to say
            times.append(time.thread_time())
        for row, some in zip(rows, step):
            row += some
    return rows, times


def cpu_generate():
    """Greedy tokens a second of a random 160M LLaVA, one thread: `written` from the first token on,
    `whole` with picture and prompt. In fp32 the tokens must be the same. Where the CPU multiplies
    bf16, both in bf16 too: `same` is the share of tokens that are their own in fp32."""
    from transformers import LogitsProcessor, LogitsProcessorList

    import data
    import generate
    from kernels.quantize import fast_bf16

    class Clock(LogitsProcessor):
        def __init__(self):
            self.times = []

        def __call__(self, ids, scores):
            self.times.append(time.thread_time())
            return scores

    words, new = [1, *range(300, 310)], 64
    half = [torch.bfloat16] if fast_bf16() else []

    def our(model, pixels):
        return written(generate, model, words + [data.IMAGE] + words[1:], pixels, new)

    def their(model, pixels):
        spread, clock = words + [image] * patches + words[1:], Clock()
        rows = torch.tensor([spread] * len(pixels))
        out = model.generate(
            input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=new,
            pixel_values=pixels.to(model.dtype), min_new_tokens=new, do_sample=False,
            pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([clock]))
        return out[:, len(spread):].tolist(), clock.times

    for deep in (False, True):
        ours, *theirs = pair_of(small_llava(deep), *half)
        image, patches, kinds = ours.image_token, ours.patches, ["", " bf16"][:1 + len(half)]
        mine = [copy.deepcopy(ours).to(dtype) for dtype in half]
        runs = {}
        for kind, model, other in zip(kinds, (ours, *mine), theirs):
            runs["ours" + kind] = partial(our, prepare_for_inference(model))
            runs["transformers" + kind] = partial(their, other)
        for B, turns in ((1, 5), (8, 2)):
            pixels, found, said = torch.randn(B, 3, 224, 224), {name: [] for name in runs}, {}
            for _ in range(turns):
                for name, run in runs.items():
                    start = time.thread_time()
                    said[name], times = run(pixels)
                    found[name].append((time.thread_time() - start, times))
            row = {"what": "30 layers of 576" if deep else "12 layers of 768", "batch": B}
            for name, took in found.items():
                row |= {f"{name} written": B * (new - 1) / statistics.median(
                            t[-1] - t[0] for _, t in took),
                        f"{name} whole": B * new / statistics.median(all for all, _ in took)}
            for kind in kinds:
                for what in ("written", "whole"):
                    row[f"times{kind}, {what}"] = (row[f"ours{kind} {what}"]
                                                   / row[f"transformers{kind} {what}"])
            for who in ("ours", "transformers") if half else ():
                pairs = [*zip(sum(said[who], []), sum(said[who + " bf16"], []))]
                row[f"{who} bf16 same"] = sum(a == b for a, b in pairs) / len(pairs)
            yield row | {"ok": said["ours"] == said["transformers"]}
        del ours, mine, theirs, runs
        gc.collect()


def cpu_step():
    """Training steps of the toy's two stages (its own samples and batches, fp32, fused AdamW),
    padded as the toy trains and packed into one row, beside the same model under transformers with
    the same batch, padded. The losses must be the same before and after the first update; later
    AdamW makes much of differences of rounding."""
    import data
    from trainer.build import new_vlm
    toy = ROOT / "toy/weights"
    for stage, B, told, template, trains in (
            (1, 16, "captions", "plain", lambda name: "projector." in name or "projector." in name),
            (2, 12, "dialogue", "v1", lambda name: "vision" not in name)):
        ours, theirs = pair_of(new_vlm(toy / "clip", toy / "llama"))
        models = {"packed": ours, "padded": copy.deepcopy(ours), "transformers": theirs.train()}
        adam = {}
        for name, model in models.items():
            for key, p in model.named_parameters():
                p.requires_grad_(trains(key))
            adam[name] = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad],
                                           lr=1e-4, fused=True)

        def batch(number):
            """What each of the three reads: {name: its loss}."""
            shown, talks = zip(*(training_sample(0, stage, number * B + i, told) for i in range(B)))
            pixels = torch.cat([data.preprocess(p, ours.image_size, "pad") for p in shown])
            texts = [data.encode(talk, template, ours.tokenizer, 1) for talk in talks]
            at = [ids.index(data.IMAGE) for ids, _ in texts]
            fill = lambda rows, value: torch.nn.utils.rnn.pad_sequence(
                list(map(torch.tensor, rows)), batch_first=True, padding_value=value)
            spliced = lambda side, what: [
                text[side][:i] + [what] * ours.patches + text[side][i + 1:]
                for text, i in zip(texts, at)]
            ids, labels = (list(side) for side in zip(*texts))
            wide, aims = spliced(0, ours.image_token), spliced(1, data.IGNORE)
            line = lambda rows: torch.tensor([sum(rows, [])])
            return {"packed": lambda: ours.loss(line(ids), line(labels), pixels,
                                                lengths=list(map(len, ids))),
                    "padded": lambda: models["padded"].loss(
                        fill(ids, 0), fill(labels, data.IGNORE), pixels,
                        fill([[True] * len(i) for i in ids], False)),
                    "transformers": lambda: theirs(
                        input_ids=fill(wide, 0), labels=fill(aims, data.IGNORE),
                        attention_mask=fill([[1] * len(i) for i in wide], 0),
                        pixel_values=pixels).loss}

        took, losses = {name: [] for name in models}, {name: [] for name in models}
        for turn in range(10):
            for name, pull in batch(turn).items():
                start = time.thread_time()
                loss = pull()
                loss.backward()
                adam[name].step()
                adam[name].zero_grad()
                took[name] += [time.thread_time() - start] * (turn > 0)
                losses[name].append(float(loss.detach()))
        fast = {name: B / statistics.median(t) for name, t in took.items()}
        yield {"what": f"toy, stage {stage}",
               **{f"{name} samples/s": x for name, x in fast.items()},
               "times": fast["packed"] / fast["transformers"],
               "times, padded": fast["padded"] / fast["transformers"],
               "first loss": losses["padded"][0],
               "ok": all(max(x) - min(x) < 1e-4 * min(x)
                         for x in zip(*(some[:2] for some in losses.values())))}


@torch.no_grad()
def cpu_quantize():
    """The toy language model with weights in int8 and int4: perplexity of 200 descriptions of
    scenes it was not trained on, and at how many places the likeliest token is still the same."""
    import data
    import llama
    from kernels.quantize import quantize
    toy, first = ROOT / "toy/weights/llama", None
    words = data.Tokenizer(toy)
    rows = [torch.tensor([words.encode(description(make_scene(i, "test")))])
            for i in range(200)]
    for what in ("fp32", "int8", "int4"):
        model = llama.Llama.from_pretrained(toy, torch.float32)
        if what != "fp32":
            quantize(model, int(what[3:]))
        logits = [model(row)[0, :-1] for row in rows]
        loss = statistics.fmean(float(F.cross_entropy(x, row[0, 1:]))
                                for x, row in zip(logits, rows))
        best = torch.cat([x.argmax(-1) for x in logits])
        first = best if first is None else first
        yield {"what": what, "perplexity": math.exp(loss), "same token": float(
            (best == first).float().mean()), "places": len(best)}
