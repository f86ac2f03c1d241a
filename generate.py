"""generate.py: talk to a model about an image.

    picture -- ViT, bridge --+
                             splice -- prefill: the whole prompt at once --> logits -- sample
    question -- ids ---------+              | writes                           ^         |
                                       keys, values -- decode: one id a step --+-- id ---+
                                       (the cache)                             until </s>

Prefill is one pass over T' places, every later token a pass over one. The picture is seen once.
Prompts of different lengths share a batch by padding on the left:

    . . . <s> USER : Hi                keep       0 0 0 1 1 1 1      padding is never looked at
    <s> USER : What is this            positions  0 0 0 0 1 2 3      from the first real token

    temperature 0    the likeliest token, always         top-k   of the k likeliest only
    temperature t    drawn from softmax(logits / t)      top-p   of the likeliest that sum to p
    beams n          the n best beginnings side by side; the best mean log-probability wins

On a GPU the step that writes a token is recorded once and replayed: see `Step`.

A character outside the vocabulary is several byte tokens; a stream waits until it is whole, and
until no stop text can have begun in it: decoding/stopping.py.
What people type is never parsed: a typed <image> or </s> is letters, not a picture or an end.
A picture in tiles (LLaVA-NeXT) goes in with its size: how it was cut decides what is kept of it.
The ### that ends an answer of MiniGPT-4 or LLaVA v0 is one token or several, so it is looked for in
the text; what may be its beginning waits until it is clear.
A repetition penalty r divides by r the logits above 0 of all ids that stand in prompt or answer,
and multiplies those below [CTRL] 1909.05858 (1.5 and 1.05 in InstructBLIP's, MiniGPT-4's demos).
Left out: beams in a batch.
Letters: B batch, T tokens, T' after splicing, C width, V vocabulary, S picture side.
Next: evaluate.py, which keeps the score.
"""

import argparse
import math
import os
import re

DEFAULT = "runs/toy/llava-1.5/stage2/model"


def text_fault(text):
    """What is wrong with a question, or None."""
    return ("the question is empty: write one" if not text.strip() else
            "the question holds a NUL byte: remove it" if "\0" in text else
            "the question is not valid UTF-8: type it again"
            if any("\ud800" <= c < "\ue000" for c in text) else None)


def fault(max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0, num_beams=1,
          repetition_penalty=1.0, stop=()):
    """What is wrong with these settings, or None; the defaults are everybody's."""
    stop = [stop] if type(stop) is str else stop
    texts = "".join(stop)
    unused = temperature == 0 and (top_p != 1 or top_k != 0)
    wrong = {"max-new-tokens must be at least 1": max_new_tokens < 1,
             "temperature must be 0 or more": not 0 <= temperature < math.inf,
             "top-p must be above 0 and at most 1": not 0 < top_p <= 1,
             "top-k must be 0 (all) or more": top_k < 0,
             "num-beams must be at least 1": num_beams < 1,
             "repetition-penalty must be above 0": not 0 < repetition_penalty < math.inf,
             "stop must be a text to end at, not an empty one": not all(stop),
             "stop is not valid UTF-8: type it again":
                 texts != texts.encode(errors="replace").decode(),
             "num-beams above 1 needs temperature 0": num_beams > 1 and temperature > 0,
             "top-p and top-k do nothing with num-beams above 1: leave them out":
                 num_beams > 1 and unused,
             "top-p and top-k do nothing at temperature 0: give --temperature above 0 as well, or "
             "leave them out": unused}
    return next((line for line, true in wrong.items() if true), None)


def named_picture(text):
    """Is the last argument a picture, and not the question? A file that exists is one, and so is a
    word that ends as pictures do: a missing picture is an error, not a question."""
    folder = os.path.dirname(text)
    suffix = re.search(r"\.(png|jpe?g|webp|gif|bmp|tiff?|heic|avif)$", text.strip(), re.I)
    one_path = not re.search(r"\s", text.strip()) or bool(folder) and os.path.isdir(folder)
    return os.path.exists(text) or bool(suffix) and one_path


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Talk to a model about an image.", allow_abbrev=False)
    p.add_argument("images", nargs="+", metavar="image", help="pictures that are asked about "
                   "together, or a folder of pictures (then with --out)")
    p.add_argument("prompt", nargs="?", help="the question; without it, a chat in the terminal")
    p.add_argument("--model", default=DEFAULT, help="folder or hub id (default: %(default)s)")
    p.add_argument("--model-base", metavar="MODEL", help="what --model, a LoRA adapter, is added "
                   "to (default: the one it names)")
    p.add_argument("--template", help="how the model is asked, instead of what its config says")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the weights in memory; auto: as they are in the file, but fp16 becomes "
                   "bf16 where the GPU has it, and on a CPU 16 bits become bf16 if it is quick at "
                   "it, else fp32")
    p.add_argument("--quantize", choices=("int8", "int4"), help="of the language model's weights")
    p.add_argument("--out", help="LLaVA JSON to write the answers about a folder to")
    p.add_argument("--max-new-tokens", type=int, default=256)
    p.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    p.add_argument("--top-p", type=float, default=1.0, help="of the likeliest that sum to p")
    p.add_argument("--top-k", type=int, default=0, help="of the k likeliest; 0: of all")
    p.add_argument("--num-beams", type=int, default=1, help="beam search")
    p.add_argument("--repetition-penalty", type=float, default=1.0, help="1: none")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT",
                   help="end before this text; may be given more than once")
    p.add_argument("--attention", metavar="PNG", help="draw where each word of the answer looked")
    p.add_argument("--layer", type=int, help="whose attention (default: the one that looks most)")
    p.add_argument("--verbose", action="store_true", help="tokens a second")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--batch-size", type=int, help="pictures of a folder at a time (default: 8)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--debug", action="store_true", help="tracebacks")
    a = p.parse_args(argv)
    a.settings = {name: getattr(a, name) for name in
                  ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams",
                   "repetition_penalty", "stop")}
    # argparse gives `images` all it gets: the last one is the question if it is no picture
    if len(a.images) > 1 and not named_picture(a.images[-1]):
        a.prompt = a.images.pop()
    a.image = a.images[0]
    folder, wrong = os.path.isdir(a.image), fault(**a.settings)
    if a.prompt is not None:
        a.prompt, wrong = a.prompt.strip(), wrong or text_fault(a.prompt)
    if not folder and a.batch_size is not None:
        wrong = "--batch-size is for a folder of pictures: leave it out"
    a.batch_size = 8 if a.batch_size is None else a.batch_size
    if a.batch_size < 1 or not 0 <= a.seed < 2 ** 62:
        wrong = "batch-size must be at least 1, seed 0 or more (below 2^62)"
    if len(a.images) > 1 and any(map(os.path.isdir, a.images)):
        wrong = "a folder of pictures is asked about alone: give one folder, or pictures"
    elif folder and not (a.prompt and a.out):
        wrong = wrong or f"{a.image} is a folder: give a question and --out FILE.json"
    if a.out and os.path.exists(a.image) and not folder:
        wrong = "--out is for a folder of pictures; the answer about one goes to stdout"
    if a.attention and (folder or a.prompt is None or len(a.images) > 1):
        wrong = "--attention is for one question about one picture"
    if a.layer is not None and not a.attention:
        wrong = "--layer says whose attention is drawn: give --attention FILE.png as well"
    if a.out and not os.path.isdir(os.path.dirname(a.out) or "."):
        wrong = f"--out {a.out}: no such folder: make it first"
    return p.error(wrong) if wrong else a


if __name__ == "__main__":
    ARGS = arguments()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# threads: PyTorch's own number, one for each core and none for its hyperthread (it asks MKL)

import functools
import json
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import data
from decoding.stopping import StopTexts, inner_decode, spell, whole_groups
from kernels import causal, rope, rope_table
from kernels.attention import visible
from kernels.launch import SPEC
from kernels.quantize import fast_bf16, lay, quantize
from llama import Cache
from projector import VLM


# ----------------------------------------------------------------------------------- the prompt

class Prompt(list):
    """Ids, and `typed`: the question as a person wrote it. An InstructBLIP's Q-Former reads that,
    for ids may have lost some of it."""

    def __init__(self, ids, typed):
        super().__init__(ids)
        self.typed = typed


def ask(turns, template, words, shown=(0,)):
    """Prompt of a conversation about pictures, ending where the model starts to write.

    turns: texts of person and model alternately, the person's first and last. shown: numbers of
    turns, each for a picture at the front of that turn: (0, 0, 2) is two in the first and one in
    the third. A typed "<image>" is no picture (and gets spaces around it where a picture follows
    later). Raises data.Usage where the template has no place for so many."""
    counts = [list(shown).count(i) for i in range(len(turns))]
    style = data.TEMPLATES[template].style if template in data.TEMPLATES else None
    if style in ("plain", "instruct") and sum(counts) > 1:
        raise data.Usage(f"a model with the template {template} takes one picture: give one")
    if style == "minigpt4" and max(counts) > 1:
        raise data.Usage(f"a model with the template {template} takes one picture a turn: ask "
                         "about one after the other")
    talk = [{"from": ("human", "gpt")[i % 2], "value": f"{data.MARK}\n" * n + text}
            for i, (n, text) in enumerate(zip(counts, turns))]
    real = []                                           # of each mark: is it a picture?
    for n, text in zip(counts, turns):
        real += [True] * n + [False] * text.count(data.MARK)
    # marks behind the last picture are letters
    last = len(real) - real[::-1].index(True) if True in real else 0
    ids = data.chat_ids(talk, template, words, pictures=last)
    if all(real[:last]):
        return Prompt(ids, turns[-1])
    letters, real = words.encode(data.MARK, bos=False, special=False), iter(real)
    return Prompt([i for token in ids for i in
                   ([token] if token != data.IMAGE or next(real) else letters)], turns[-1])


def places(model, ids, sizes=None):
    """Places that the ids take in the model's context; sizes as for `generate`."""
    pictures = ids.count(data.IMAGE)
    if not pictures:
        return len(ids)
    return len(ids) - pictures + sum(map(model.places, sizes or [None] * pictures))


def begin(model, prompts, pictures, max_new_tokens, sizes=None):
    """Prompts side by side: the decoder, x (B, T', C), keep (B, T'), how many ids may follow each.

    Raises data.BadData if pictures and their places differ, data.Failure for a prompt that is
    empty or fills the context."""
    llm, room, sizes = getattr(model, "llm", model), [], sizes or [None] * len(prompts)
    for ids, pixels, size in zip(prompts, pictures, sizes, strict=True):
        given = 0 if pixels is None else len(pixels) if size is None else len(size)
        if ids.count(data.IMAGE) != given or given and llm is model:
            raise data.BadData(f"{ids.count(data.IMAGE)} <image> places in a prompt, {given} "
                               "pictures; give one for each place, to a model that can see")
        taken = places(model, ids, size)
        if not 0 < taken < llm.config.context:
            raise data.Failure(f"the prompt takes {taken} places, the model's context has "
                               f"{llm.config.context} and the answer needs some: shorten it")
        room.append(min(max_new_tokens, llm.config.context - taken))
    T, like = max(map(len, prompts)), llm.embed.weight
    ids = torch.tensor([[0] * (T - len(p)) + [*p] for p in prompts], device=like.device)
    keep = torch.tensor([[i >= T - len(p) for i in range(T)] for p in prompts], device=like.device)
    if llm is model:
        return llm, llm.embed(ids), keep, room
    pixels = [p for p in pictures if p is not None]
    pixels = torch.cat(pixels).to(like) if pixels else None
    every = [one for size in sizes for one in size or ()]
    # one for each picture; where a prompt is ids alone, `embed` reads the ids of all
    typed = [p.typed if isinstance(p, Prompt) else None for p in prompts for i in p
             if i == data.IMAGE]
    x, _, keep = model.embed(ids, pixels, None, keep, left=True, sizes=every,
                             questions=None if None in typed else typed)
    return llm, x, keep, room


# ------------------------------------------------------------------------------- the next token

def endings(model, eos=None):
    """Ids after which the model has finished: eos (an id or a set) if given, else those of its
    tokenizer, of its template and of its generation_config.json."""
    if eos is not None or not hasattr(model, "words"):
        return eos if isinstance(eos, (set, frozenset)) else {eos}
    return data.end_ids(model.template, model.words) | set(getattr(model, "ends", ()))


def stop_text(model, eos=None):
    """The text that ends an answer, where its template has an end that is no token, or None."""
    if eos is not None or not hasattr(model, "words"):
        return None
    return data.stop_text(model.template, model.words)


def penalise(scores, seen, penalty):
    """scores (B, V), logits or log-probabilities; seen (B, V) bool."""
    less = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, less, scores)


def seen_in(prompts, vocab, device):
    """(B, V) bool: which ids stand in each prompt."""
    seen = torch.zeros(len(prompts), vocab, dtype=torch.bool)
    for row, ids in zip(seen, prompts):
        row[[i for i in ids if i >= 0]] = True
    return seen.to(device)


def limit(room, max_new_tokens):
    """Why an answer of `room` tokens goes on no further."""
    return "length" if room == max_new_tokens else "context"


def predict(llm, x, cache, positions=None, keep=None):
    """Logits (B, V) of what follows the last place."""
    return llm.head(llm.hidden(x, cache, positions, keep)[:, -1]).float()


def damaged(llm):
    """The error of an output that is not a number. Weights from a file were finite when loaded."""
    here = llm.embed.weight.dtype
    if here != torch.float32 and all(p.isfinite().all() for p in llm.parameters()):
        other = "--dtype bf16 or fp32" if here == torch.float16 else "--dtype fp32"
        return data.BadModel("the model's output is not a number (NaN): its weights are whole, but "
                             f"what is computed from them is too large for {data.dtype_name(here)};"
                             f" take {other}")
    return data.BadModel("the model's output is not a number (NaN): its weights are damaged; take "
                         "another checkpoint")


def dice(seed, rows, count):
    """(count, rows) numbers in [0, 1): column i from seed + i, the same whatever the others are."""
    throw = lambda i: torch.randint(2 ** 50, (count,), generator=torch.Generator().manual_seed(i))
    return torch.stack([throw(seed + i) for i in range(rows)], 1).double() / 2 ** 50


def sample(logits, u=None, temperature=0.0, top_p=1.0, top_k=0):
    """One id a row: logits (V) or (B, V) -> () or (B). Temperature, then top-k, then top-p.

    u () or (B), from `dice`, falls between two of the sums p₀, p₀ + p₁ ...: that is the id drawn.
    All in fp64, so that a seed says the same on every device, and nothing waits for the device.
    [top-p] 1904.09751"""
    if not temperature:
        return logits.argmax(-1)
    x = logits.double()
    x = (x - x.amax(-1, keepdim=True)) / temperature     # at most 0: small temperatures are safe
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        p, order = x.softmax(-1).sort(descending=True)
        late = p.cumsum(-1) - p >= top_p                 # those before it sum to top_p already
        x = x.masked_fill(late.scatter(-1, order, late), -math.inf)
    # whole numbers of 2⁻⁵⁰: sums are exact in any order, and what is left out has no share at all
    sums = (x.softmax(-1) * 2 ** 50).long().cumsum(-1)
    return (sums <= (u * sums[..., -1]).long()[..., None]).sum(-1)


class Choice:
    """Which id comes next, in every row. All it goes by lies on the device; the dice of the whole
    answer are thrown before its first word."""

    def __init__(self, llm, prompts, count, seed=0, temperature=0.0, top_p=1.0, top_k=0,
                 penalty=1.0):
        device = llm.embed.weight.device
        self.how, self.penalty = (temperature, top_p, top_k), penalty
        self.u = dice(seed, len(prompts), count).to(device) if temperature else None
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = seen_in(prompts, llm.config.vocab, device) if penalty != 1 else None

    def __call__(self, logits):
        """logits (B, V) -> ids (B), -1 where a row's logits are not numbers."""
        broken = ~logits.amax(-1).isfinite()            # the maximum of NaN and others is NaN
        logits = logits.masked_fill(broken[:, None], 0)
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.penalty)
        new = sample(logits, None if self.u is None else self.u.index_select(0, self.step)[0],
                     *self.how)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, new[:, None], True)
        return new.masked_fill(broken, -1)


# --------------------------------------------------------------------------------------- steps

def one_by_one(llm, x, keep, memory, choose, count):
    """Yield `count` steps' ids, a list of B each: a step reads what is written of the cache.

    For CPUs, where a launch costs little, and `Step`, which reads the whole capacity behind a mask,
    takes 1.1 to 1.4 times as long (160M weights, one core, 32 and 256 tokens of room)."""
    lengths, positions = keep.sum(1, keepdim=True), (keep.cumsum(1) - 1).clamp(min=0)
    for step in range(count):
        new = choose(predict(llm, x, memory, positions, keep))
        yield new.tolist()
        # rows that have ended go on talking to themselves: cheaper than taking them out
        new, at = new[:, None], lengths + step                                       # (B, 1)
        if memory is not None:
            x, positions = new, at
        else:
            x, positions = torch.cat((x, llm.embed(new)), 1), torch.cat((positions, at), 1)
            keep = torch.cat((keep, torch.ones_like(new).bool()), 1)


class Step:
    """One token more in every row: a step that is the same every time, to the address.

        token (B, 1) -> embed -> blocks -> head -> choose --+
          ^                        |                        |      place (B, 1), the cache's at
          |              writes place `at`, reads           |      and end, the dice's number: + 1
          |              what lies before `end`             |
          +-------------------------------------------------+

    A 7B step is 14 launches a layer and 30 around the layers, 480 in all (counted in the code). A
    GPU that gets them one by one waits for the host, which says with each where the cache ends.
    Here all that changes lies in tensors that the step itself moves on. So a GPU is told once what
    to do, in a CUDA graph; from then on a token is one call, and a text writes itself without a
    word from the host."""

    def __init__(self, llm, memory, choose, token, place):
        """After the prompt: token (B, 1) chosen from its logits, place (B, 1) in its text."""
        memory.hold()
        self.llm, self.memory, self.choose = llm, memory, choose
        self.token, self.place = token.clone(), place.clone()

    def __call__(self):
        # a row that is damaged says -1 from then on, and reads some token: nobody looks at it
        new = self.choose(predict(self.llm, self.token.clamp(min=0), self.memory, self.place))
        self.token.copy_(new[:, None])
        self.place += 1


EAGER = 3           # steps run before one is recorded: they compile all that is launched, and the
                    # answer of a word or two is over by then


def record(step, side):
    """The CUDA graph of step(), which has run before: the first time kernels are compiled. side: a
    stream, on which nothing else runs. Raises data.Failure."""
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # nothing runs: it is written down; other threads (a loader's) may go on meanwhile
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        torch.cuda.set_stream(here)
        raise
    except RuntimeError as error:
        # quirk: after an error torch.cuda.graph stays on its stream, and hides the step's own error
        torch.cuda.set_stream(here)
        error = error.__context__ or error
        raise data.Failure("a step cannot be recorded as a CUDA graph "
                           f"({str(error).strip().splitlines()[0]}): set KERNELS=spec in the "
                           "environment, which is slow, and report this") from None
    return graph


@functools.cache
def beside(device):
    """The stream to record on: one a device, for PyTorch keeps cuBLAS's scratch for each."""
    return torch.cuda.Stream(device)


def replayed(llm, x, keep, memory, choose, count):
    """`one_by_one`'s ids by `Step`, recorded once and replayed; with KERNELS=spec, only run.

    The host reads a step's ids while the next is running, so the GPU never waits for it:

        GPU     step 4 | step 5 | step 6 | step 7        host   reads 4 | reads 5 | reads 6

    At an end one step has run for nothing. Raises as `record` does."""
    lengths, positions = keep.sum(1, keepdim=True), (keep.cumsum(1) - 1).clamp(min=0)
    step = Step(llm, memory, choose, choose(predict(llm, x, memory, positions, keep))[:, None],
                lengths)
    yield step.token[:, 0].tolist()
    side, here = beside(x.device), torch.cuda.current_stream(x.device)
    eager = count if SPEC else min(count, EAGER)
    for _ in range(1, eager):
        side.wait_stream(here)
        with torch.cuda.stream(side):
            step()
        here.wait_stream(side)
        yield step.token[:, 0].tolist()
    if eager == count:
        return
    graph, told = record(step, side), torch.empty(2, len(x), dtype=torch.long).pin_memory()
    there = torch.cuda.Event(), torch.cuda.Event()
    for n in range(eager, count + 1):
        if n < count:
            graph.replay()
            told[n % 2].copy_(step.token[:, 0], non_blocking=True)
            there[n % 2].record(here)
        if n > eager:
            there[(n - 1) % 2].synchronize()
            yield told[(n - 1) % 2].tolist()


@torch.inference_mode()
def beams(model, ids, pixels, sizes, ends, max_new_tokens, width, stop=None, penalty=1.0,
          answer=None):
    """The tokens of the answer with the best mean log-probability, its end counted.
    answer: is told why it ended, as in `decode`.

    Of the likeliest continuations of `width` beginnings, those that end are put aside and the
    best `width` others go on, until `width` have ended and none that runs has a better mean:
    transformers' rule (length_penalty 1, early_stopping False)."""
    llm, x, _, (room,) = begin(model, [ids], [pixels], max_new_tokens, [sizes])
    memory = Cache(llm.config, 1, x.shape[1] + room, x)
    stop = {stop: "stop"} if type(stop) is str else stop or {}
    # (sum of log-probabilities, parent, tokens, what looks for stop texts in them)
    running, done = [(0.0, 0, [], StopTexts(stop, getattr(model, "words", None)))], []
    for step in range(1, room + 1):
        scores = predict(llm, x, memory).log_softmax(-1)                             # (n, V)
        if scores.isnan().any():
            raise damaged(llm)
        if penalty != 1:
            seen = seen_in([ids + row for _, _, row, _ in running], scores.shape[1], scores.device)
            scores = penalise(scores, seen, penalty)
        scores = scores + scores.new_tensor([[score] for score, *_ in running])
        wanted = width * (1 + len(ends) + bool(stop))
        best, heads = scores.flatten().topk(min(wanted, scores.numel())), []
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(at, scores.shape[1])
            tokens, watch = running[parent][2] + [token], running[parent][3].copy()
            if token in ends:
                reason = watch.finish()[1] or "end"
            else:
                _, reason = watch.add(token)
            if not reason and len(heads) < width:
                heads.append((score, parent, tokens, watch))
            elif reason and rank < width:
                done.append((score / step, tokens[:watch.count], reason, watch.rest))
        done, running = sorted(done, reverse=True)[:width], heads
        if not heads or len(done) == width and done[-1][0] >= heads[0][0] / step:
            break
        parents = torch.tensor([parent for _, parent, *_ in heads], device=x.device)
        memory.pick(parents)
        x = torch.tensor([[tokens[-1]] for _, _, tokens, _ in heads], device=x.device)  # (n, 1)
    else:
        for score, _, tokens, watch in running:
            reason = watch.finish()[1] or limit(room, max_new_tokens)
            done.append((score / room, tokens[:watch.count], reason, watch.rest))
    _, tokens, *told = max(done)
    if answer is not None:
        answer.finish_reason, answer.rest = told
    return tokens


@torch.inference_mode()
def decode(model, prompts, pictures, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
           num_beams=1, seed=0, eos=None, cache=True, sizes=None, repetition_penalty=1.0, stop=(),
           answers=None):
    """Yield, a step, the ids that each row adds: a list of one, or of none when it has ended or
    waits until it is clear that no stop text has begun, and then of several.

    Row i draws from its own dice, seed + i: its neighbours cannot change what it says.
    answers: for each row an object, which is told `finish_reason` and `rest`: see `Generation`."""
    if wrong := fault(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty,
                      stop):
        raise data.Usage(wrong)
    if stop and not hasattr(model, "words"):
        raise data.Usage("stop texts need a model with a tokenizer: give a VLM, or eos")
    ends, sizes = dict.fromkeys(endings(model, eos), "end"), sizes or [None] * len(prompts)
    answers = answers or [Tokens() for _ in prompts]
    stop = dict.fromkeys([stop] if type(stop) is str else stop, "stop")
    if own := stop_text(model, eos):
        stop[own] = "end"
    # decoding leaves out special tokens, so a text that is a token is looked for by its id
    for text in [text for text in stop if model.words.added(text) is not None]:
        ends.setdefault(model.words.added(text), stop.pop(text))
    if num_beams > 1:
        yield [beams(model, p, x, size, ends, max_new_tokens, num_beams, stop, repetition_penalty,
                     answer)
               for p, x, size, answer in zip(prompts, pictures, sizes, answers, strict=True)]
        return
    llm, x, keep, room = begin(model, prompts, pictures, max_new_tokens, sizes)
    memory = Cache(llm.config, len(x), x.shape[1] + max(room), x, keep) if cache else None
    choose = Choice(llm, prompts, max(room), seed, temperature, top_p, top_k, repetition_penalty)
    # FSDP gathers weights on a stream of its own, which a graph cannot record
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    way = replayed if cache and x.is_cuda and alone else one_by_one
    watches = [StopTexts(stop, getattr(model, "words", None)) for _ in prompts]
    alive = [True] * len(prompts)
    for step, new in enumerate(way(llm, x, keep, memory, choose, max(room))):
        if min(new) < 0:
            raise damaged(llm)
        out = [[] for _ in prompts]
        for i, token in enumerate(new):
            if not alive[i]:
                continue
            reason = ends.get(token)
            if not reason:
                out[i], reason = watches[i].add(token)
            if not reason and step + 1 == room[i]:
                reason = limit(room[i], max_new_tokens)
            if reason:
                tokens, found = watches[i].finish()
                out[i], alive[i] = out[i] + tokens, False
                answers[i].finish_reason, answers[i].rest = found or reason, watches[i].rest
        if any(out) or any(alive):
            yield out
        if not any(alive):
            return


# ------------------------------------------------------------------------------------- answers

class Generation:
    """Iterator of the token ids of an answer. After the last one:

    finish_reason   "end"      the model has finished: its end token, or its template's end text
                    "stop"     a text of `stop` came
                    "length"   cut: max_new_tokens were written
                    "context"  cut: the model's context is full
    said, times     the ids so far, and when each came (time.perf_counter)
    rest            characters before the stop text in the token in which it begins, which is not
                    handed out; `spell` and `stream` write them"""

    def __init__(self, rows, said):
        """rows: of `decode`, which tells `said`, a `Tokens`, why it ended."""
        self.tokens = (token for row in rows for token in row[0])
        self.said, self.times = said, []

    def __iter__(self):
        return self

    def __next__(self):
        self.said.append(next(self.tokens))
        self.times.append(time.perf_counter())
        return self.said[-1]

    @property
    def finish_reason(self):
        return self.said.finish_reason

    @property
    def rest(self):
        return self.said.rest


class Tokens(list):
    """The token ids of an answer in a batch; finish_reason and rest: as in `Generation`."""
    finish_reason, rest = None, ""


def generate(model, ids, pixels=None, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
             num_beams=1, seed=0, eos=None, cache=True, sizes=None, repetition_penalty=1.0,
             stop=()):
    """`Generation`: iterator of the token ids that follow the prompt, without the end token.

    model: a VLM, or a llama.Llama for text; ids: list of int, data.IMAGE for a picture; pixels
    (n, 3, S, S), one for each, or all their tiles with sizes [(width, height)]. Beams come
    all at once, and always use the cache.
    stop: texts before which the answer ends, and the token in which one begins is left out.
    cache=False computes everything again for every token: slow, and the same.
    Raises, with the first token, data.Usage, data.BadModel for NaN, and as `begin` does."""
    said, sizes = Tokens(), None if sizes is None else [sizes]
    rows = decode(model, [ids], [pixels], max_new_tokens, temperature, top_p, top_k, num_beams,
                  seed, eos, cache, sizes, repetition_penalty, stop, [said])
    return Generation(rows, said)


def generate_batch(model, prompts, pictures=None, **settings):
    """`Tokens` of each of many prompts, what `generate` says to it, side by side; row i has seed
    + i.

    pictures: for each prompt pixels (n, 3, S, S) or None; sizes: for each prompt a list or None;
    settings as for `generate`."""
    out, pictures = [Tokens() for _ in prompts], pictures or [None] * len(prompts)
    for row in decode(model, prompts, pictures, **settings, answers=out) if out else ():
        for tokens, new in zip(out, row):
            tokens += new
    return out


def stream(model, ids, pixels=None, **settings):
    """The answer as text, piece by piece; settings as for `generate`."""
    return filter(None, spell(generate(model, ids, pixels, **settings), model.words))


# ------------------------------------------------------------------------------------ where to

@torch.inference_mode()
def looked(model, ids, tokens, pixels, layer=None):
    """How much each token of an answer looked at each patch: (tokens, P), the mean over heads of
    the attention from the place that wrote it; layer: None, the one that looks there most.

    Computed again from the whole text in one pass: while writing nothing is kept or slowed down.
    Raises data.Usage for models whose pictures are no grid of patches."""
    if model.kind == "qformer" or model.aspect == "anyres":
        raise data.Usage("--attention needs a model that reads a picture as one grid of patches: "
                         "LLaVA or LLaVA-1.5, no Q-Former and no tiles")
    if ids.count(data.IMAGE) != 1:
        raise data.Usage("--attention is for one question about one picture: give one")
    llm, at = model.llm, ids.index(data.IMAGE)
    if layer is not None and not 0 <= layer < llm.config.depth:
        raise data.Usage(f"--layer {layer}: the model has layers 0 to {llm.config.depth - 1}")
    row = torch.tensor([[*ids, *tokens]], device=llm.embed.weight.device)
    x = model.embed(row, pixels.to(llm.embed.weight))[0][:, :-1]                 # (1, T, C)
    T, n = x.shape[1], len(tokens)
    cos, sin = rope_table(torch.arange(T, device=x.device)[None], llm.config.head_dim,
                          llm.config.theta, llm.config.scaling)
    H, G, D = llm.config.heads, llm.config.kv_heads, llm.config.head_dim
    rule = {"allow": causal, **llm.config.rule(T)}
    hidden = ~visible(**rule, rows=n, columns=T, start=T - n, device=x.device)   # (n, T)
    found = []
    for i, block in enumerate(llm.blocks):
        if layer in (None, i):
            qkv = block.qkv(block.norm1(x)).view(1, T, H + 2 * G, D)
            rope(qkv[:, :, :H + G], cos, sin, inplace=True)
            q, k, _ = qkv[0].split((H, G, G), dim=1)
            k = k.repeat_interleave(H // G, dim=1)
            scores = torch.einsum("qhd,khd->hqk", q[-n:].float(), k.float()) * D ** -.5
            p = scores.masked_fill(hidden, -math.inf).softmax(-1).mean(0)         # (n, T)
            found.append(p[:, at:at + model.patches].cpu())
        if layer == i:
            break
        x = block(x, cos, sin)
    return max(found, key=torch.sum)


def inside(grid, box):
    """Mean of grid (s, s) over patches whose middle lies in box (x1, y1, x2, y2), and the others.
    A box without a middle takes the patch that holds its own."""
    s = len(grid)
    middle = (torch.arange(s) + .5) / s
    x1, y1, x2, y2 = box
    there = ((middle >= y1) & (middle <= y2))[:, None] & ((middle >= x1) & (middle <= x2))
    if not there.any():
        there[min(int((y1 + y2) / 2 * s), s - 1), min(int((x1 + x2) / 2 * s), s - 1)] = True
    return float(grid[there].mean()), float(grid[~there].mean())


def attention_picture(model, image, words, grids):
    """PIL image: the picture as the model saw it, once a word, lit where the word looked."""
    from PIL import Image, ImageDraw
    std, mean = (torch.tensor(v)[:, None, None] for v in (data.STD, data.MEAN))
    seen = (model.pixels(image)[0] * std + mean).clamp(0, 1).permute(1, 2, 0) * 255
    seen = Image.fromarray(seen.byte().numpy()).resize((168, 168))
    across = min(8, len(words))
    sheet = Image.new("RGB", (across * 176, -(-len(words) // across) * 192), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (word, grid) in enumerate(zip(words, grids)):
        light = (grid / grid.max() * 255).byte().numpy()
        light = Image.fromarray(light).resize(seen.size, Image.Resampling.BILINEAR)
        dark = Image.blend(seen, Image.new("RGB", seen.size), .75)
        x, y = i % across * 176 + 4, i // across * 192 + 18
        sheet.paste(Image.composite(seen, dark, light), (x, y))
        # the built-in font has Latin letters only
        pen.text((x, y - 14), word.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return sheet


def by_word(tokens, words):
    """[(word, numbers of its tokens)] of an answer."""
    out, at, pending, decode = [], 0, [], inner_decode(words)
    for token in tokens:
        groups, pending = whole_groups(pending + [token], decode)
        for group, text in groups:
            if not out or text.startswith((" ", "\n")) or not out[-1][0].strip():
                out.append(["", []])
            out[-1][0] += text.strip()
            out[-1][1] += range(at, at + len(group))
            at += len(group)
    return [(word, numbers) for word, numbers in out if word]


# ------------------------------------------------------------------------------ the command line

def note(line):
    """One line for the person, not for the pipe."""
    tqdm.write(line, file=sys.stderr)


def ready(model, codes=None):
    """The model with its weights as decoding reads them best, or coded: kernels/quantize.py.
    Not to be trained or saved after."""
    if codes:
        if model.llm.embed.weight.device.type == "cpu":
            note("note: --quantize saves memory; on a CPU the weights are written out again for "
                 "every token, which is several times slower")
        try:
            quantize(model.llm, {"int8": 8, "int4": 4}[codes])
        except ValueError as error:
            raise data.BadModel(f"--quantize {codes}: {error}") from None
    return lay(model)


def at_home(model, device):
    """The model in the numbers that this device is good at. A CPU: 16 bits stay 16 if it multiplies
    bf16. A GPU that has bf16: not fp16, in which some models overflow."""
    here = model.llm.embed.weight.dtype
    if device.type == "cuda" and here == torch.float16 and torch.cuda.is_bf16_supported(
            including_emulation=False):
        note("note: the weights are float16, in which some models overflow: they become bf16, 3 "
             "bits fewer of each number (--dtype keeps or chooses)")
        return model.to(torch.bfloat16)
    if device.type != "cpu":
        return model
    best = torch.bfloat16 if fast_bf16() else torch.float32
    if here in (best, torch.float32):
        return model
    name, price = ("bf16", "3 bits fewer of each number") if best == torch.bfloat16 else (
        "fp32", "twice the memory")
    note(f"note: the weights are {data.dtype_name(here)}, which this CPU is slow at: they become "
         f"{name}, {price} (--dtype keeps or chooses)")
    return model.to(best)


def load(args, codes=None):
    """The model, on its device, `ready`. Raises data.BadModel, data.Offline, data.Usage."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = auto if args.device == "auto" else args.device
    try:
        there = torch.zeros(1, device=device)
        there.item()
    except (RuntimeError, AssertionError) as error:      # what torch raises for a device not there
        why = str(error).strip().split("\n")[0]
        raise data.Usage(f"--device {device}: {why}: try --device cpu") from None
    if args.model == DEFAULT and not Path(DEFAULT).is_dir():
        raise data.BadModel(f"{DEFAULT}: no model yet: run `make demo`, or train.py --stage 1 and "
                            "--stage 2, or name a model with --model")
    if there.is_cuda:
        torch.cuda.set_device(there.device)             # kernels start on the current one
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}.get(args.dtype)
    model = VLM.from_pretrained(args.model, dtype, getattr(args, "model_base", None))
    if dtype is None:
        model = at_home(model, there.device)
    if args.template and args.template not in data.TEMPLATES:
        raise data.Usage(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    model.template = args.template or model.template
    if data.template_of(model.template).style == "plain":
        note("note: this model knows pictures and captions but no questions: yours is ignored, it "
             "writes a caption")
    return ready(model.to(device), codes)


def see(path, model):
    """A picture's file -> pixels (n, 3, S, S) and, where the model cuts pictures, [its size]."""
    image = data.load_image(path)
    return model.pixels(image), [image.size] if model.aspect == "anyres" else None


def sample_of(name, turns, shown=(0,)):
    """One LLaVA sample. name: of its picture, or a list with one for each number in `shown`, which
    are as for `ask`. In a file any <image> is a picture, so a typed one gets a space."""
    shown = list(shown)
    turns = [t.replace(data.MARK, "< image>") for t in turns]
    turns = [f"{data.MARK}\n" * shown.count(i) + t for i, t in enumerate(turns)]
    return {"id": name if type(name) is str else name[0], "image": name, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


def names_in(paths):
    """The folder that holds all the pictures, and their names in it."""
    paths = [os.path.abspath(path) for path in paths]
    root = os.path.commonpath([os.path.dirname(path) for path in paths])
    return root, [Path(os.path.relpath(path, root)).as_posix() for path in paths]


def write(path, samples):
    """JSON, whole or not at all: aside, fsync, rename. Raises data.Failure."""
    aside = os.path.join(os.path.dirname(path), f".generate-{os.getpid()}.tmp")
    # a rename would replace /dev/stdout itself
    if not os.path.isdir(os.path.dirname(path) or ".") or (os.path.exists(path)
                                                           and not os.path.isfile(path)):
        raise data.Failure(f"{path}: not a file in a folder that exists: name another")
    try:
        with open(aside, "w", encoding="utf-8") as f:
            json.dump(samples, f, ensure_ascii=False, indent=1)
            f.flush()
            os.fsync(f.fileno())
        os.replace(aside, path)
    except OSError as error:
        Path(aside).unlink(missing_ok=True)
        raise data.Failure(f"{path}: {error.strerror}: name another file") from None
    except UnicodeEncodeError:
        Path(aside).unlink(missing_ok=True)
        raise data.Failure(f"{path}: not written: a picture's name is not valid UTF-8: rename "
                           "it") from None


def reading(device):
    """GB/s at which this machine reads its memory: the best of a few sums of 256 MB."""
    x, best = torch.ones(2 ** 26, device=device), math.inf
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best / 1e9


def speed(model, taken, start, times, width=1):
    """One line: the prompt's tokens a second, the answer's, and those against what reading the
    weights once a token would allow. Beams come all at once: of those the whole time."""
    first = (times[0] if times else time.perf_counter()) - start
    if width > 1:
        return (f"prompt: {taken} places; answer: {len(times)} tokens, {first:.2f} s for both with "
                f"{width} beams")
    line = f"prompt: {taken} places in {first:.2f} s, {taken / first:,.0f}/s"
    times = times[EAGER if model.llm.embed.weight.is_cuda else 0:]      # those compile and record
    if len(times) > 1 and times[-1] > times[0]:
        rate = (len(times) - 1) / (times[-1] - times[0])
        coded = [t for part in (model.llm.blocks, model.llm.head) for layer in part.modules()
                 for t in (getattr(layer, "weight", None), getattr(layer, "codes", None),
                           getattr(layer, "scales", None)) if torch.is_tensor(t)]
        ceiling = reading(coded[0].device) * 1e9 / sum(t.nbytes for t in coded)
        line += (f"; answer: {rate:,.1f} tokens/s, {100 * rate / ceiling:.0f} % of the "
                 f"{ceiling:,.0f} that reading the weights allows")
    return line


def together(shown):
    """{turn: (pixels, sizes, ...)} -> all pixels, all sizes or None, in the order of the turns."""
    pictures = [shown[i][:2] for i in sorted(shown)]
    sizes = [size for _, some in pictures for size in some or ()]
    return torch.cat([pixels for pixels, _ in pictures]), sizes or None


def numbers(shown):
    """{turn: (pixels, sizes, ...)} -> the turns as `ask` takes them, one number for a picture."""
    return [i for i, (pixels, sizes, *_) in sorted(shown.items()) for _ in sizes or pixels]


def pictured(model, paths):
    """The pictures of one turn: (pixels (n, 3, S, S), sizes or None, their files)."""
    return *together(dict(enumerate(see(path, model) for path in paths))), list(paths)


def cut_at(reason, model, max_new_tokens):
    """What to tell of an answer whose `finish_reason` says that it was cut; None for the others."""
    return {"length": f"cut at --max-new-tokens {max_new_tokens}: give more",
            "context": f"cut where the model's context of {model.llm.config.context} places is "
            "full: use fewer words or pictures (/reset in a chat)"}.get(reason)


def answer(model, turns, shown, args):
    """Print the answer as it is written; returns it. shown: {turn: (pixels, sizes, ...)}."""
    said, ids = "", ask(turns, model.template, model.words, numbers(shown))
    pixels, sizes = together(shown)
    start = time.perf_counter()
    written = generate(model, ids, pixels, seed=args.seed, sizes=sizes, **args.settings)
    for piece in filter(None, spell(written, model.words)):
        print(piece, end="", flush=True)
        said += piece
    print(flush=True)
    tokens, times = written.said, written.times
    if why := cut_at(written.finish_reason, model, args.max_new_tokens):
        note(f"note: the answer is {why}")
    if args.attention and not said.strip():
        note(f"note: the answer has no words: {args.attention} is not drawn")
    if args.attention and said.strip():
        parts = by_word(tokens, model.words)
        side = int(model.patches ** .5)
        grids = looked(model, ids, tokens, pixels, args.layer).view(-1, side, side)
        sheet = attention_picture(model, data.load_image(args.image), [w for w, _ in parts],
                                  [grids[rows].mean(0) for _, rows in parts])
        try:
            sheet.save(args.attention)
        except (OSError, ValueError) as error:          # no such folder; no such kind of picture
            raise data.Failure(f"--attention {args.attention}: {error}: name a .png") from None
    if args.verbose:
        note(speed(model, places(model, ids, sizes), start, times, args.num_beams))
    return said.strip()


def remembered(model, turns, shown, max_new_tokens):
    """The newest turns that fit the context with an answer behind them, at least the last, and
    their pictures {turn: (pixels, sizes, ...)}: if they have none, the newest of those before."""
    context, kept = model.llm.config.context, turns
    room = context - min(max_new_tokens, context // 4)
    while len(kept) > 1 and places(model, ask(kept, model.template, model.words, numbers(shown)),
                                   together(shown)[1]) > room:
        kept, old = kept[2:], shown
        shown = {i - 2: picture for i, picture in old.items() if i >= 2}
        shown = shown or {0: old[max(old)]}
    if kept is not turns:
        note(f"note: the context of {context} places is full: the oldest "
             f"{(len(turns) - len(kept)) // 2} question(s) and answer(s) are forgotten")
    return kept, shown


def check_room(model, picture):
    """Raises data.Usage if a turn cannot hold these pictures, data.Failure if the model's context
    cannot."""
    taken = places(model, ask(["?"], model.template, model.words, numbers({0: picture})),
                   picture[1])
    if taken >= model.llm.config.context:
        raise data.Failure(f"{', '.join(map(str, picture[2]))}: take {taken} places in one "
                           f"question, the model's context has {model.llm.config.context}: give "
                           "fewer pictures")


def with_picture(model, shown, turn, path):
    """`shown` with one more picture in this turn, behind those that it has; {0: the new one alone}
    if the model takes no more. Raises as `check_room` does."""
    new = pictured(model, [path])
    both = new
    if turn in shown:
        pixels, sizes = together({0: shown[turn], 1: new})
        both = pixels, sizes, [*shown[turn][2], path]
    after = {**shown, turn: both}
    try:
        ask(["?"] * (turn + 1), model.template, model.words, numbers(after))
    except data.Usage as error:
        note(f"note: {error}: the talk begins anew with this one")
        return {0: new}
    check_room(model, both)
    return after


def saved(path, turns, shown):
    """Write a talk as LLaVA JSON, with the pictures of the turns that have been asked."""
    asked = {i: picture for i, picture in shown.items() if i < len(turns)}
    root, names = names_in([name for i in sorted(asked) for name in asked[i][2]])
    write(path, [sample_of(names if len(names) > 1 else names[0], turns, numbers(asked))])
    note(f"saved: {path}" + (f", its pictures are in {root}" if len(names) > 1 else ""))


def chat(model, picture, args):
    """Questions from stdin until it ends. What goes wrong in a turn ends that turn only."""
    turns, shown = [], {0: picture}
    note("chat: /image PATH (one more picture, behind those before)  /reset  /save FILE  /quit")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        command, _, path = (part.strip() for part in line.partition(" "))
        try:
            if not line:
                continue
            if text_fault(line):
                raise data.Usage(text_fault(line))
            if command == "/quit":
                return 0
            if command == "/reset":
                turns, shown = [], {0: shown[max(shown)]}
            elif command == "/image":
                shown = with_picture(model, shown, len(turns), path)
                turns = turns if len(turns) in shown else []        # the talk began anew
            elif command == "/save" and path and turns:
                saved(path, turns, shown)
            elif command.startswith("/"):
                raise data.Usage("the commands are /image PATH, /reset, /save FILE (once something "
                                 "has been said), /quit")
            else:
                kept, after = remembered(model, turns + [line], shown, args.max_new_tokens)
                turns, shown = kept + [answer(model, kept, after, args)], after
        except data.Failure as error:
            note(f"error: {error}")


def tokens_of(path, model):
    """Places that a picture's file will take; 0 if it cannot be read."""
    try:
        return model.places(data.load_image(path).size)
    except data.BadImage:
        return 0


def captions(model, files, args):
    """Ask the same about every picture and write LLaVA JSON; bad pictures are passed over."""
    ids, samples, told = ask([args.prompt], model.template, model.words), [], time.time()
    reasons, count, began = [], 0, time.perf_counter()
    if model.aspect == "anyres":            # elsewhere all pictures take the same places
        files = sorted(files, key=lambda path: (tokens_of(path, model), path))
    for start in tqdm(range(0, len(files), args.batch_size), disable=None):
        good = []
        for path in files[start:start + args.batch_size]:
            try:
                path.name.encode()
                good.append((path.name, see(path, model)))
            except (data.BadImage, UnicodeEncodeError) as error:
                note(f"skipped: {error}")
        said = generate_batch(model, [ids] * len(good), [x for _, (x, _) in good],
                              sizes=[size for _, (_, size) in good], seed=args.seed + start,
                              **args.settings)
        reasons += [tokens.finish_reason for tokens in said]
        count += sum(map(len, said))
        samples += [sample_of(name, [args.prompt, "".join(spell(x, model.words)).strip()])
                    for (name, _), x in zip(good, said)]
        if not sys.stderr.isatty() and time.time() - told > 5:
            told = time.time()
            note(f"{min(start + args.batch_size, len(files))}/{len(files)} pictures")
    samples.sort(key=lambda sample: sample["image"])
    if not samples:
        raise data.BadImage(f"{args.image}: none of its {len(files)} pictures can be used; "
                            "see the lines above")
    write(args.out, samples)
    note(f"{args.out}: {len(samples)} of {len(files)} pictures")
    for reason in ("length", "context"):
        if reason in reasons:
            why = cut_at(reason, model, args.max_new_tokens)
            note(f"note: {reasons.count(reason)} of {len(samples)} answers: {why}")
    if args.verbose:
        seconds = time.perf_counter() - began
        note(f"{count} tokens in {seconds:.1f} s, {count / seconds:,.1f}/s")


def main(args):
    """Cheap checks first: the picture, and only then the model."""
    sys.stdin.reconfigure(errors="surrogateescape")      # a bad byte is a complaint, not a crash
    sys.stdout.reconfigure(errors="replace")
    if os.path.isdir(args.image):
        files, others = data.list_pictures(args.image)
        for line in others:
            note(f"note: {line}")
        if not files:
            raise data.BadImage(f"{args.image}: holds no picture: give a folder with some "
                                f"({', '.join(data.FORMATS)})")
        return captions(load(args, args.quantize), files, args)
    for path in args.images:
        data.load_image(path)
    model = load(args, args.quantize)
    picture = pictured(model, args.images)
    check_room(model, picture)
    if args.prompt is None:
        return chat(model, picture, args)
    answer(model, [args.prompt], {0: picture}, args)


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
