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

A character outside the vocabulary is several byte tokens; a stream waits until it is whole.
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
    wrong = {"max-new-tokens must be at least 1": max_new_tokens < 1,
             "temperature must be 0 or more": not 0 <= temperature < math.inf,
             "top-p must be above 0 and at most 1": not 0 < top_p <= 1,
             "top-k must be 0 (all) or more": top_k < 0,
             "num-beams must be at least 1": num_beams < 1,
             "repetition-penalty must be above 0": not 0 < repetition_penalty < math.inf,
             "stop must be a text to end at, not an empty one": not all(stop),
             "num-beams above 1 needs temperature 0": num_beams > 1 and temperature > 0}
    return next((line for line, true in wrong.items() if true), None)


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Talk to a model about an image.", allow_abbrev=False)
    p.add_argument("image", help="a picture, or a folder of pictures (then with --out)")
    p.add_argument("prompt", nargs="?", help="the question; without it, a chat in the terminal")
    p.add_argument("--model", default=DEFAULT, help="folder or hub id (default: %(default)s)")
    p.add_argument("--template", help="how the model is asked, instead of what its config says")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16", "fp16"), default="auto",
                   help="of the weights in memory; auto: as they are in the file, but on a CPU 16 "
                   "bits become bf16 if it is quick at it, else fp32")
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
    p.add_argument("--batch-size", type=int, default=8, help="pictures of a folder at a time")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    p.add_argument("--debug", action="store_true", help="tracebacks")
    a = p.parse_args(argv)
    a.settings = {name: getattr(a, name) for name in
                  ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams",
                   "repetition_penalty", "stop")}
    folder, wrong = os.path.isdir(a.image), fault(**a.settings)
    if a.prompt is not None:
        a.prompt, wrong = a.prompt.strip(), wrong or text_fault(a.prompt)
    if a.batch_size < 1 or not 0 <= a.seed < 2 ** 62:
        wrong = "batch-size must be at least 1, seed 0 or more (below 2^62)"
    if folder and not (a.prompt and a.out):
        wrong = wrong or f"{a.image} is a folder: give a question and --out FILE.json"
    if a.out and os.path.exists(a.image) and not folder:
        wrong = "--out is for a folder of pictures; the answer about one goes to stdout"
    if a.attention and (folder or a.prompt is None):
        wrong = "--attention is for one question about one picture"
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

    turns: texts of person and model alternately, the person's first and last; a picture stands
    before each turn whose number is in `shown`. A typed "<image>" is no picture (and gets spaces
    around it where a picture follows later)."""
    talk = [{"from": ("human", "gpt")[i % 2], "value": f"{data.MARK}\n" * (i in shown) + text}
            for i, text in enumerate(turns)]
    real = [here for i, text in enumerate(turns)
            for here in [True] * (i in shown) + [False] * text.count(data.MARK)]
    last = len(real) - real[::-1].index(True)           # marks behind the last picture are letters
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
    """Ids after which the model has finished: eos if given, else those of its template."""
    if eos is not None or not hasattr(model, "words"):
        return {eos}
    words, template = model.words, data.TEMPLATES.get(model.template)
    if template and template.end == "\n":       # a caption's end is a byte token behind a prefix
        return {words.eos, words.encode("\n", bos=False)[-1]}
    return {words.eos, words.added(template.end if template else "</s>")}


def stop_text(model, eos=None):
    """The text that ends an answer, where its template has an end that is no token, or None."""
    template = data.TEMPLATES.get(getattr(model, "template", None))
    if eos is not None or template is None or template.end == "\n":
        return None
    return template.end if model.words.added(template.end) is None else None


def stopped(tokens, model, stops):
    """How many tokens at the end hold a stop text (0: none), and whether they may yet become one.
    A token that holds more than that goes with it. stops: texts, or one, or None."""
    stops = [stops] if type(stops) is str else stops
    if not stops:
        return 0, False
    longest, words = max(len(stop.encode()) for stop in stops), model.words
    a = words.encode("a", bos=False)[-1:]               # a text's first space is dropped: `spell`
    tails = [words.decode(a + tokens[-n:])[1:] for n in range(1, 2 + longest)]
    return (next((n for n, text in enumerate(tails, 1) if any(s in text for s in stops)), 0),
            any(tails[-1].endswith(s[:n]) for s in stops for n in range(1, len(s))))


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


def predict(llm, x, cache, positions=None, keep=None):
    """Logits (B, V) of what follows the last place."""
    return llm.head(llm.hidden(x, cache, positions, keep)[:, -1]).float()


def damaged():
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
def beams(model, ids, pixels, sizes, ends, max_new_tokens, width, stop=None, penalty=1.0):
    """The tokens of the answer with the best mean log-probability, its end counted.

    Of the likeliest continuations of `width` beginnings, those that end are put aside and the
    best `width` others go on, until `width` have ended and none that runs has a better mean:
    transformers' rule (length_penalty 1, early_stopping False)."""
    llm, x, _, (room,) = begin(model, [ids], [pixels], max_new_tokens, [sizes])
    memory = Cache(llm.config, 1, x.shape[1] + room, x)
    running, done = [(0.0, 0, [])], []                  # (sum of log-probabilities, parent, tokens)
    for step in range(1, room + 1):
        scores = predict(llm, x, memory).log_softmax(-1)                             # (n, V)
        if scores.isnan().any():
            raise damaged()
        if penalty != 1:
            seen = seen_in([ids + row for _, _, row in running], scores.shape[1], scores.device)
            scores = penalise(scores, seen, penalty)
        scores = scores + scores.new_tensor([[score] for score, _, _ in running])
        wanted = width * (1 + len(ends) + bool(stop))
        best, heads = scores.flatten().topk(min(wanted, scores.numel())), []
        for rank, (score, at) in enumerate(zip(best.values.tolist(), best.indices.tolist())):
            parent, token = divmod(at, scores.shape[1])
            tokens = running[parent][2] + [token]
            over = token in ends or stopped(tokens, model, stop)[0]
            if not over and len(heads) < width:
                heads.append((score, parent, tokens))
            elif over and rank < width:
                done.append((score / step, tokens[:-over]))     # True is 1
        done, running = sorted(done, reverse=True)[:width], heads
        if not heads or len(done) == width and done[-1][0] >= heads[0][0] / step:
            break
        parents = torch.tensor([parent for _, parent, _ in heads], device=x.device)
        memory.pick(parents)
        x = torch.tensor([[tokens[-1]] for _, _, tokens in heads], device=x.device)  # (n, 1)
    else:
        done += [(score / room, tokens) for score, _, tokens in running]
    return max(done)[1]


@torch.inference_mode()
def decode(model, prompts, pictures, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
           num_beams=1, seed=0, eos=None, cache=True, sizes=None, repetition_penalty=1.0, stop=()):
    """Yield, a step, the ids that each row adds: a list of one, of none when it has ended or waits.

    Row i draws from its own dice, seed + i: its neighbours cannot change what it says."""
    if wrong := fault(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty,
                      stop):
        raise data.Usage(wrong)
    if stop and not hasattr(model, "words"):
        raise data.Usage("stop texts need a model with a tokenizer: give a VLM, or eos")
    ends, sizes = endings(model, eos), sizes or [None] * len(prompts)
    stop = [stop] if type(stop) is str else stop
    stop = [text for text in (stop_text(model, eos), *stop) if text]
    if num_beams > 1:
        yield [beams(model, p, x, size, ends, max_new_tokens, num_beams, stop, repetition_penalty)
               for p, x, size in zip(prompts, pictures, sizes, strict=True)]
        return
    llm, x, keep, room = begin(model, prompts, pictures, max_new_tokens, sizes)
    memory = Cache(llm.config, len(x), x.shape[1] + max(room), x, keep) if cache else None
    choose = Choice(llm, prompts, max(room), seed, temperature, top_p, top_k, repetition_penalty)
    # FSDP gathers weights on a stream of its own, which a graph cannot record
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    way = replayed if cache and x.is_cuda and alone else one_by_one
    held, alive = [[] for _ in prompts], [True] * len(prompts)
    for step, new in enumerate(way(llm, x, keep, memory, choose, max(room))):
        if min(new) < 0:
            raise damaged()
        out = [[] for _ in prompts]
        for i, token in enumerate(new):
            if alive[i]:
                alive[i] = step < room[i] and token not in ends
                held[i] += [token] * alive[i]
                found, wait = stopped(held[i], model, stop)
                if found:
                    alive[i], held[i] = False, held[i][:-found]
                if not (wait and alive[i]):
                    out[i], held[i] = held[i], []
        if any(out) or any(alive):
            yield out
        if not any(alive):
            return
    yield held


# ------------------------------------------------------------------------------------- answers

def generate(model, ids, pixels=None, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
             num_beams=1, seed=0, eos=None, cache=True, sizes=None, repetition_penalty=1.0,
             stop=()):
    """Iterator of the token ids that follow the prompt, without the end token.

    model: a VLM, or a llama.Llama for text; ids: list of int, data.IMAGE for a picture; pixels
    (n, 3, S, S), one for each, or all their tiles with sizes [(width, height)]. Beams come
    all at once, and always use the cache.
    stop: texts before which the answer ends.
    cache=False computes everything again for every token: slow, and the same.
    Raises, with the first token, data.Usage, data.BadModel for NaN, and as `begin` does."""
    rows = decode(model, [ids], [pixels], max_new_tokens, temperature, top_p, top_k, num_beams,
                  seed, eos, cache, None if sizes is None else [sizes], repetition_penalty, stop)
    return (token for row in rows for token in row[0])


def generate_batch(model, prompts, pictures=None, **settings):
    """What `generate` says to each of many prompts, decoded side by side; row i has seed + i.

    pictures: for each prompt pixels (n, 3, S, S) or None; sizes: for each prompt a list or None;
    settings as for `generate`."""
    out = [[] for _ in prompts]
    for row in decode(model, prompts, pictures or [None] * len(out), **settings) if out else ():
        for tokens, new in zip(out, row):
            tokens += new
    return out


def spell(tokens, words):
    """Token ids -> pieces of text as they come, each of whole characters only.

    Bytes that never become a character are U+FFFD inside a text and nothing at its end."""
    anchor, held = [], []
    for token in tokens:
        held.append(token)
        # decoding drops a text's first space, so later pieces are decoded behind an "a"
        text = words.decode(anchor + held)[len(anchor):]
        if not text.endswith("\ufffd"):
            yield text
            anchor, held = words.encode("a", bos=False)[-1:], []
    yield words.decode(anchor + held)[len(anchor):].rstrip("\ufffd")


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
    out, text = [], ""
    for i, piece in enumerate(words.decode(tokens[:n + 1]) for n in range(len(tokens))):
        new, text = piece[len(text):], piece
        if not out or new.startswith((" ", "\n")) or not out[-1][0].strip():
            out.append(["", []])
        out[-1][0] += new.strip()
        out[-1][1].append(i)
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


def at_home(model):
    """The model in the numbers that this CPU is quick at: 16 bits stay 16 if it multiplies bf16."""
    here, best = model.llm.embed.weight.dtype, torch.bfloat16 if fast_bf16() else torch.float32
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
    model = VLM.from_pretrained(args.model, dtype)
    if dtype is None and there.device.type == "cpu":
        model = at_home(model)
    if args.template and args.template not in data.TEMPLATES:
        raise data.Usage(f"--template {args.template!r} is unknown: choose one of "
                         f"{', '.join(data.TEMPLATES)}")
    model.template = args.template or model.template
    if data.TEMPLATES[model.template].style == "plain":
        note("note: this model knows pictures and captions but no questions: yours is ignored, it "
             "writes a caption")
    return ready(model.to(device), codes)


def see(path, model):
    """A picture's file -> pixels (n, 3, S, S) and, where the model cuts pictures, [its size]."""
    image = data.load_image(path)
    return model.pixels(image), [image.size] if model.aspect == "anyres" else None


def sample_of(name, turns):
    """One LLaVA sample. In a file any <image> is a picture, so a typed one gets a space."""
    turns = [t.replace(data.MARK, "< image>") for t in turns]
    turns[0] = f"{data.MARK}\n{turns[0]}"
    return {"id": name, "image": name, "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(turns)]}


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


def reading(device):
    """GB/s at which this machine reads its memory: the best of a few sums of 256 MB."""
    x, best = torch.ones(2 ** 26, device=device), math.inf
    for _ in range(6):
        start = time.perf_counter()
        x.sum().item()
        best = min(best, time.perf_counter() - start)
    return x.nbytes / best / 1e9


def speed(model, taken, first, times):
    """One line: the prompt's tokens a second, the answer's, and those against what reading the
    weights once a token would allow."""
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
    """{turn: (pixels, sizes)} -> all pixels, all sizes or None."""
    pictures = [shown[i] for i in sorted(shown)]
    sizes = [size for _, some in pictures for size in some or ()]
    return torch.cat([pixels for pixels, _ in pictures]), sizes or None


def answer(model, turns, shown, args):
    """Print the answer as it is written; returns it. shown: {turn: (pixels, sizes)}."""
    said, ids = "", ask(turns, model.template, model.words, shown)
    pixels, sizes = together(shown)
    start, times, tokens_said = time.perf_counter(), [], []

    def noted():
        for token in generate(model, ids, pixels, seed=args.seed, sizes=sizes, **args.settings):
            times.append(time.perf_counter())
            tokens_said.append(token)
            yield token
    for piece in filter(None, spell(noted(), model.words)):
        print(piece, end="", flush=True)
        said += piece
    print(flush=True)
    if args.attention and said.strip():
        parts = by_word(tokens_said, model.words)
        side = int(model.patches ** .5)
        grids = looked(model, ids, tokens_said, pixels, args.layer).view(-1, side, side)
        sheet = attention_picture(model, data.load_image(args.image), [w for w, _ in parts],
                                  [grids[numbers].mean(0) for _, numbers in parts])
        try:
            sheet.save(args.attention)
        except (OSError, ValueError) as error:          # no such folder; no such kind of picture
            raise data.Failure(f"--attention {args.attention}: {error}: name a .png") from None
    if args.verbose and times and args.num_beams == 1:          # beams come all at once
        note(speed(model, places(model, ids, sizes), times[0] - start, times))
    return said.strip()


def remembered(model, turns, shown, max_new_tokens):
    """The newest turns that fit the context with an answer behind them, at least the last, and
    their pictures {turn: (pixels, sizes)}: if they have none, the newest of those before."""
    context, kept = model.llm.config.context, turns
    room = context - min(max_new_tokens, context // 4)
    while len(kept) > 1 and places(model, ask(kept, model.template, model.words, shown),
                                   together(shown)[1]) > room:
        kept, old = kept[2:], shown
        shown = {i - 2: picture for i, picture in old.items() if i >= 2}
        shown = shown or {0: old[max(old)]}
    if kept is not turns:
        note(f"note: the context of {context} places is full: the oldest "
             f"{(len(turns) - len(kept)) // 2} question(s) and answer(s) are forgotten")
    return kept, shown


def chat(model, picture, args):
    """Questions from stdin until it ends. What goes wrong in a turn ends that turn only."""
    turns, shown, names = [], {0: picture}, {id(picture): args.image}
    note("chat: /image PATH (another picture, beside the first)  /reset  /save FILE  /quit")
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
                new = see(path, model)
                names[id(new)] = path
                after = {**shown, len(turns): new}
                if ask(turns + [""], model.template, model.words, after).count(
                        data.IMAGE) < len(after):
                    note("note: this model takes one picture: the talk begins anew")
                    turns, after = [], {0: new}
                shown = after
            elif command == "/save" and path and turns:
                asked = [i for i in shown if i < len(turns)]
                if asked != [0]:
                    raise data.Usage("LLaVA's files hold one picture a talk, before its first "
                                     "question, and here are others: /reset, and save then")
                write(path, [sample_of(os.path.basename(names[id(shown[0])]), turns)])
                note(f"saved: {path}")
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


def main(args):
    """Cheap checks first: the picture, and only then the model."""
    sys.stdin.reconfigure(errors="surrogateescape")      # a bad byte is a complaint, not a crash
    sys.stdout.reconfigure(errors="replace")
    if os.path.isdir(args.image):
        kinds = ".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"
        files = sorted(p for p in Path(args.image).iterdir() if p.suffix.lower() in kinds)
        if not files:
            raise data.BadImage(f"{args.image}: holds no picture ({' '.join(kinds)})")
        return captions(load(args, args.quantize), files, args)
    data.load_image(args.image)
    model = load(args, args.quantize)
    picture = see(args.image, model)
    if args.prompt is None:
        return chat(model, picture, args)
    answer(model, [args.prompt], {0: picture}, args)


if __name__ == "__main__":
    sys.exit(data.guarded(lambda: main(ARGS), ARGS.debug))
