"""bench.cpu: one core. Generation with 160M weights and training of the toy, beside transformers.

The candidates take turns on the same tensors, and the median counts: whatever else runs on the
machine slows all of them. Tokens and losses must agree, or the row is not ok.
"""
import copy
import gc
import math
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import clip
import data
import llama
from decoding.loading import prepare_for_inference
from generate import generate_rows
from kernels.quantize import fast_bf16, quantize
from projector import VLM
from toy.texts import description, training_sample
from toy.world import make_scene
from trainer.build import new_vlm

TOY = Path(__file__).parents[1] / "toy/weights"


def with_reference(model, *dtypes):
    """(ours, transformers' LLaVA with the same weights in fp32, and in each of `dtypes`)."""
    from transformers import LlavaForConditionalGeneration
    references = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for dtype in (torch.float32, *dtypes):
            references.append(LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype))
    return model, *references


# --------------------------------------------------------------------------------- generation

def small_llava(deep):
    """160M random weights, 256 patches: the language model of LLaMA-160M's proportions, or (deep)
    SmolLM2-135M's: 30 narrow layers, 9 heads for 3 key heads."""
    if deep:
        size = dict(vocab=49152, width=576, depth=30, heads=9, kv_heads=3, mlp=1536,
                    tie_embeddings=True)
    else:
        size = dict(vocab=32000, width=768, depth=12, heads=12, kv_heads=12, mlp=2048)
    vision = clip.ViT(clip.Config(width=512, depth=8, heads=8, mlp=2048, image_size=224,
                                  patch_size=14))
    model = VLM(vision, "mlp", llama.Llama(llama.Config(**size)), data.Tokenizer(TOY / "llama"))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:             # logits so far apart that rounding decides no token
                p.normal_(0, p.shape[-1] ** -.5)
        model.llm.embed.weight.normal_()
    return model.eval()


def timed_tokens(model, ids, pixels, new):
    """Tokens (B, new) of ours, and the second at which each column was ready."""
    times, rows = [], [[] for _ in pixels]
    pictures = list(pixels[:, None])                            # (1, 3, S, S) each
    for step in generate_rows(model, [ids] * len(rows), pictures, new, eos=-1):
        if any(step):                   # the last step may add nothing
            times.append(time.thread_time())
        for row, some in zip(rows, step):
            row += some
    return rows, times


def timed_reference(model, words, image_token, patches, pixels, new):
    """The same of transformers."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Clock(LogitsProcessor):
        """Is called once a token: the place to look at the time."""

        def __init__(self):
            self.times = []

        def __call__(self, ids, scores):
            self.times.append(time.thread_time())
            return scores

    ids, clock = words + [image_token] * patches + words[1:], Clock()
    rows = torch.tensor([ids] * len(pixels))
    out = model.generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), max_new_tokens=new,
        pixel_values=pixels.to(model.dtype), min_new_tokens=new, do_sample=False,
        pad_token_id=0, eos_token_id=None, logits_processor=LogitsProcessorList([clock]))
    return out[:, len(ids):].tolist(), clock.times


def generation_row(runs, kinds, pixels, turns, new):
    """Figures of one batch. runs: {"ours", "transformers", "ours bf16" ...: function(pixels)}."""
    B, row = len(pixels), {}
    taken, tokens = {name: [] for name in runs}, {}
    for _ in range(turns):
        for name, run in runs.items():
            start = time.thread_time()
            tokens[name], times = run(pixels)
            taken[name].append((time.thread_time() - start, times[-1] - times[0]))
    for name, seconds in taken.items():
        whole, written = (statistics.median(column) for column in zip(*seconds))
        row |= {f"{name} written": B * (new - 1) / written, f"{name} whole": B * new / whole}
    for kind in kinds:
        for what in ("written", "whole"):
            row[f"times{kind}, {what}"] = (row[f"ours{kind} {what}"]
                                           / row[f"transformers{kind} {what}"])
    for who in ("ours", "transformers") if len(kinds) > 1 else ():
        pairs = [*zip(sum(tokens[who], []), sum(tokens[f"{who} bf16"], []))]
        row[f"{who} bf16 same"] = sum(a == b for a, b in pairs) / len(pairs)
    return row | {"ok": tokens["ours"] == tokens["transformers"]}


def cpu_generate():
    """Greedy tokens a second of a random 160M LLaVA, one thread: `written` from the first token on,
    `whole` with picture and prompt. In fp32 the tokens must be the same. Where the CPU multiplies
    bf16, both in bf16 too: `same` is the share of tokens that are their own in fp32."""
    words, new = [1, *range(300, 310)], 64
    ids = words + [data.IMAGE] + words[1:]
    dtypes, kinds = ([torch.bfloat16], ["", " bf16"]) if fast_bf16() else ([], [""])
    for deep in (False, True):
        ours, *references = with_reference(small_llava(deep), *dtypes)
        copies = [ours, *(copy.deepcopy(ours).to(dtype) for dtype in dtypes)]
        image_token, patches, runs = ours.image_token, ours.patches, {}
        for kind, model, reference in zip(kinds, copies, references):
            ready = prepare_for_inference(model, lay_out=True)
            runs["ours" + kind] = partial(timed_tokens, ready, ids, new=new)
            runs["transformers" + kind] = partial(timed_reference, reference, words, image_token,
                                                  patches, new=new)
        for B, turns in ((1, 5), (8, 2)):
            about = {"what": "30 layers of 576" if deep else "12 layers of 768", "batch": B}
            pixels = torch.randn(B, 3, 224, 224)
            yield about | generation_row(runs, kinds, pixels, turns, new)
        del ours, copies, references, runs, ready, model, reference
        gc.collect()


# ----------------------------------------------------------------------------------- training

def pad(rows, value):
    """Rows of unlike length -> (B, T), filled up on the right."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def in_place_of_image(texts, side, value, patches):
    """Ids (side 0) or labels (side 1) with `patches` values where IMAGE stands, as in the hub."""
    rows = []
    for text in texts:
        at = text[0].index(data.IMAGE)
        rows.append(text[side][:at] + [value] * patches + text[side][at + 1:])
    return rows


def losses_of(models, stage, first, B, style, template):
    """{name: function that computes its loss} on the same B samples."""
    ours, padded, reference = (models[name] for name in ("packed", "padded", "transformers"))
    samples = [training_sample(0, stage, first + i, style) for i in range(B)]
    pixels = torch.cat([data.preprocess(image, ours.image_size, "pad") for image, _ in samples])
    texts = [data.encode(talk, template, ours.tokenizer, 1) for _, talk in samples]
    ids, labels = (list(side) for side in zip(*texts))
    wide = in_place_of_image(texts, 0, ours.image_token, ours.patches)
    targets = in_place_of_image(texts, 1, data.IGNORE, ours.patches)

    def packed_loss():
        row, targets = torch.tensor([sum(ids, [])]), torch.tensor([sum(labels, [])])
        return ours.loss(row, targets, pixels, lengths=[len(x) for x in ids])

    def padded_loss():
        mask = pad([[True] * len(x) for x in ids], False)
        return padded.loss(pad(ids, 0), pad(labels, data.IGNORE), pixels, mask)

    def reference_loss():
        mask = pad([[1] * len(x) for x in wide], 0)
        return reference(input_ids=pad(wide, 0), labels=pad(targets, data.IGNORE),
                         attention_mask=mask, pixel_values=pixels).loss
    return {"packed": packed_loss, "padded": padded_loss, "transformers": reference_loss}


def trains_in(stage, name):
    """Does LLaVA train this parameter in this stage? Names: ours, or transformers'."""
    return "projector." in name if stage == 1 else "vision" not in name


def cpu_step():
    """Training steps of the toy's two stages (its own samples and batches, fp32, fused AdamW),
    padded as the toy trains and packed into one row, beside the same model under transformers with
    the same batch, padded. The losses must be the same before and after the first update; later
    AdamW enlarges differences of rounding."""
    for stage, B, style, template in ((1, 16, "captions", "plain"), (2, 12, "dialogue", "v1")):
        ours, reference = with_reference(new_vlm(TOY / "clip", TOY / "llama"))
        models = {"packed": ours, "padded": copy.deepcopy(ours), "transformers": reference.train()}
        adam = {}
        for name, model in models.items():
            for key, p in model.named_parameters():
                p.requires_grad_(trains_in(stage, key))
            trained = [p for p in model.parameters() if p.requires_grad]
            adam[name] = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        taken, losses = {name: [] for name in models}, {name: [] for name in models}
        for turn in range(10):
            for name, compute in losses_of(models, stage, turn * B, B, style, template).items():
                start = time.thread_time()
                loss = compute()
                loss.backward()
                adam[name].step()
                adam[name].zero_grad()
                if turn > 0:            # the first is slower
                    taken[name].append(time.thread_time() - start)
                losses[name].append(float(loss.detach()))
        fast = {name: B / statistics.median(times) for name, times in taken.items()}
        agree = True
        for values in zip(*(some[:2] for some in losses.values())):
            agree &= max(values) - min(values) < 1e-4 * min(values)
        yield {"what": f"toy, stage {stage}",
               **{f"{name} samples/s": x for name, x in fast.items()},
               "times": fast["packed"] / fast["transformers"],
               "times, padded": fast["padded"] / fast["transformers"],
               "first loss": losses["padded"][0], "ok": agree}


# ------------------------------------------------------------------- gradients of micro-batches

def summed_gradients(model, samples, grad_dtype):
    """All gradients of the mean loss of the samples, added up one sample after the other."""
    trained = [p for name, p in model.named_parameters() if trains_in(2, name)]
    for p in trained:
        p.grad, p.grad_dtype = None, grad_dtype
    for image, talk in samples:
        ids, labels = data.encode(talk, "v1", model.tokenizer, 1)
        pixels = data.preprocess(image, model.image_size, "pad").to(trained[0].dtype)
        loss = model.loss(torch.tensor([ids]), torch.tensor([labels]), pixels)
        (loss / len(samples)).backward()
    return torch.cat([p.grad.flatten().double() for p in trained if p.grad is not None])


def cpu_sums():
    """The gradient of a step of the toy's stage 2 with bf16 weights, its micro-batches added up in
    bf16 and in fp32: relative distances to the gradient of the same weights with everything in
    fp32, and of the two to each other. What a micro-batch's own gradient is off by, no sum can
    mend."""
    exact = new_vlm(TOY / "clip", TOY / "llama").bfloat16().float()
    rough = copy.deepcopy(exact).bfloat16()
    for n in (1, 4, 19, 64):
        samples = [training_sample(0, 2, i, "dialogue") for i in range(n)]
        truth = summed_gradients(exact, samples, torch.float32)
        row, found = {"what": f"{n} micro-batches"}, []
        for name, grad_dtype in (("bf16 sums", torch.bfloat16), ("fp32 sums", torch.float32)):
            found.append(summed_gradients(rough, samples, grad_dtype))
            row[name] = float((found[-1] - truth).norm() / truth.norm())
        yield {**row, "apart": float((found[0] - found[1]).norm() / found[1].norm())}


# ------------------------------------------------------------------------------- quantization

@torch.no_grad()
def cpu_quantize():
    """The toy language model with weights in int8 and int4: perplexity of 200 descriptions of
    scenes it was not trained on, and at how many positions the likeliest token is the same."""
    folder, first = TOY / "llama", None
    tokenizer = data.Tokenizer(folder)
    rows = [torch.tensor([tokenizer.encode(description(make_scene(i, "test")))])
            for i in range(200)]
    for what in ("fp32", "int8", "int4"):
        model = llama.Llama.from_pretrained(folder, torch.float32)
        if what != "fp32":
            quantize(model, int(what[3:]))
        logits = [model(row)[0, :-1] for row in rows]
        loss = statistics.fmean(float(F.cross_entropy(x, row[0, 1:]))
                                for x, row in zip(logits, rows))
        best = torch.cat([x.argmax(-1) for x in logits])
        first = best if first is None else first
        same = float((best == first).float().mean())
        yield {"what": what, "perplexity": math.exp(loss), "same token": same,
               "places": len(best)}
