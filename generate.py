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

import math
import os

if __name__ == "__main__":
    from decoding.flags import parse
    ARGS = parse()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# threads: PyTorch's own number, one for each core and none for its hyperthread (it asks MKL)

import sys
import time

import torch

import data
from decoding.attention_map import attention_to_patches, draw, tokens_by_word
from decoding.beam import beam_search
from decoding.chat import caption_folder, chat, check_room, cut_at, numbers, pictured, together
from decoding.cuda_graph import decode_graph
from decoding.flags import check_settings, parse
from decoding.loading import load_model, speed_line
from decoding.prompt import build_prompt, places, Prompt
from decoding.stopping import (
    damaged,
    ids_seen,
    limit,
    repetition_penalty,
    spell,
    stop_ids,
    stop_text,
    StopTexts,
)
from formats.errors import exit_status, note, UsageError, UserError
from formats.pictures import FORMATS, list_pictures
from llama import KVCache

# ----------------------------------------------------------------------------------- the prompt


def prefill_inputs(model, prompts, pictures, max_new_tokens, sizes=None):
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
            raise UserError(f"the prompt takes {taken} places, the model's context has "
                               f"{llm.config.context} and the answer needs some: shorten it")
        room.append(min(max_new_tokens, llm.config.context - taken))
    T, like = max(map(len, prompts)), llm.embed.weight
    ids = torch.tensor([[0] * (T - len(p)) + [*p] for p in prompts], device=like.device)
    attention_mask = torch.tensor([[i >= T - len(p) for i in range(T)] for p in prompts], device=like.device)
    if llm is model:
        return llm, llm.embed(ids), attention_mask, room
    pixels = [p for p in pictures if p is not None]
    pixels = torch.cat(pixels).to(like) if pixels else None
    every = [one for size in sizes for one in size or ()]
    # one for each picture; where a prompt is ids alone, `embed` reads the ids of all
    typed = [p.typed if isinstance(p, Prompt) else None for p in prompts for i in p
             if i == data.IMAGE]
    x, _, attention_mask = model.embed(ids, pixels, None, attention_mask, left=True, sizes=every,
                             questions=None if None in typed else typed)
    return llm, x, attention_mask, room


def uniforms(seed, rows, count):
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


class Sampler:
    """Which id comes next, in every row. All it goes by lies on the device; the dice of the whole
    answer are thrown before its first word."""

    def __init__(self, llm, prompts, count, seed=0, temperature=0.0, top_p=1.0, top_k=0,
                 penalty=1.0):
        device = llm.embed.weight.device
        self.how, self.penalty = (temperature, top_p, top_k), penalty
        self.u = uniforms(seed, len(prompts), count).to(device) if temperature else None
        self.step = torch.zeros(1, dtype=torch.long, device=device)
        self.seen = ids_seen(prompts, llm.config.vocab, device) if penalty != 1 else None

    def __call__(self, logits):
        """logits (B, V) -> ids (B), -1 where a row's logits are not numbers."""
        broken = ~logits.amax(-1).isfinite()            # the maximum of NaN and others is NaN
        logits = logits.masked_fill(broken[:, None], 0)
        if self.seen is not None:
            logits = repetition_penalty(logits, self.seen, self.penalty)
        new = sample(logits, None if self.u is None else self.u.index_select(0, self.step)[0],
                     *self.how)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, new[:, None], True)
        return new.masked_fill(broken, -1)


# --------------------------------------------------------------------------------------- steps

def decode_steps(llm, x, attention_mask, memory, choose, count):
    """Yield `count` steps' ids, a list of B each: a step reads what is written of the cache.

    For CPUs, where a launch costs little, and `Step`, which reads the whole capacity behind a mask,
    takes 1.1 to 1.4 times as long (160M weights, one core, 32 and 256 tokens of room)."""
    lengths, position_ids = attention_mask.sum(1, keepdim=True), (attention_mask.cumsum(1) - 1).clamp(min=0)
    for step in range(count):
        new = choose(llm.next_logits(x, memory, position_ids, attention_mask))
        yield new.tolist()
        # rows that have ended go on talking to themselves: cheaper than taking them out
        new, at = new[:, None], lengths + step                                       # (B, 1)
        if memory is not None:
            x, position_ids = new, at
        else:
            x, position_ids = torch.cat((x, llm.embed(new)), 1), torch.cat((position_ids, at), 1)
            attention_mask = torch.cat((attention_mask, torch.ones_like(new).bool()), 1)


@torch.inference_mode()
def generate_rows(model, prompts, pictures, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
           num_beams=1, seed=0, eos=None, cache=True, sizes=None, repetition_penalty=1.0, stop=(),
           answers=None):
    """Yield, a step, the ids that each row adds: a list of one, or of none when it has ended or
    waits until it is clear that no stop text has begun, and then of several.

    Row i draws from its own dice, seed + i: its neighbours cannot change what it says.
    answers: for each row an object, which is told `finish_reason` and `rest`: see `Generation`."""
    if wrong := check_settings(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty,
                      stop):
        raise UsageError(wrong)
    if stop and not hasattr(model, "tokenizer"):
        raise UsageError("stop texts need a model with a tokenizer: give a VLM, or eos")
    ends, sizes = dict.fromkeys(stop_ids(model, eos), "end"), sizes or [None] * len(prompts)
    answers = answers or [Tokens() for _ in prompts]
    stop = dict.fromkeys([stop] if type(stop) is str else stop, "stop")
    if own := stop_text(model, eos):
        stop[own] = "end"
    # decoding leaves out special tokens, so a text that is a token is looked for by its id
    for text in [text for text in stop if model.tokenizer.added(text) is not None]:
        ends.setdefault(model.tokenizer.added(text), stop.pop(text))
    if num_beams > 1:
        found = []
        for ids, pixels, size, answer in zip(prompts, pictures, sizes, answers, strict=True):
            llm, x, _, (room,) = prefill_inputs(model, [ids], [pixels], max_new_tokens, [size])
            watch = StopTexts(stop, getattr(model, "tokenizer", None))
            reason = limit(room, max_new_tokens)
            tokens, *why = beam_search(llm, x, room, ids, ends, num_beams, watch,
                                       repetition_penalty, reason)
            answer.finish_reason, answer.rest = why
            found.append(tokens)
        yield found
        return
    llm, x, attention_mask, room = prefill_inputs(model, prompts, pictures, max_new_tokens, sizes)
    memory = KVCache(llm.config, len(x), x.shape[1] + max(room), x, attention_mask) if cache else None
    choose = Sampler(llm, prompts, max(room), seed, temperature, top_p, top_k, repetition_penalty)
    # FSDP gathers weights on a stream of its own, which a graph cannot record
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    way = decode_graph if cache and x.is_cuda and alone else decode_steps
    watches = [StopTexts(stop, getattr(model, "tokenizer", None)) for _ in prompts]
    alive = [True] * len(prompts)
    for step, new in enumerate(way(llm, x, attention_mask, memory, choose, max(room))):
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
    rows = generate_rows(model, [ids], [pixels], max_new_tokens, temperature, top_p, top_k, num_beams,
                  seed, eos, cache, sizes, repetition_penalty, stop, [said])
    return Generation(rows, said)


def generate_batch(model, prompts, pictures=None, **settings):
    """`Tokens` of each of many prompts, what `generate` says to it, side by side; row i has seed
    + i.

    pictures: for each prompt pixels (n, 3, S, S) or None; sizes: for each prompt a list or None;
    settings as for `generate`."""
    out, pictures = [Tokens() for _ in prompts], pictures or [None] * len(prompts)
    for row in generate_rows(model, prompts, pictures, **settings, answers=out) if out else ():
        for tokens, new in zip(out, row):
            tokens += new
    return out


def stream(model, ids, pixels=None, **settings):
    """The answer as text, piece by piece; settings as for `generate`."""
    return filter(None, spell(generate(model, ids, pixels, **settings), model.tokenizer))


def print_answer(model, turns, shown, args):
    """Print the answer as it is written; returns it. shown: {turn: (pixels, sizes, ...)}."""
    said, ids = "", build_prompt(turns, model.template, model.tokenizer, numbers(shown))
    pixels, sizes = together(shown)
    start = time.perf_counter()
    written = generate(model, ids, pixels, seed=args.seed, sizes=sizes, **args.settings)
    for piece in filter(None, spell(written, model.tokenizer)):
        print(piece, end="", flush=True)
        said += piece
    print(flush=True)
    tokens, times = written.said, written.times
    if why := cut_at(written.finish_reason, model, args.max_new_tokens):
        note(f"note: the answer is {why}")
    if args.attention and not said.strip():
        note(f"note: the answer has no words: {args.attention} is not drawn")
    if args.attention and said.strip():
        parts = tokens_by_word(tokens, model.tokenizer)
        side = int(model.patches ** .5)
        grids = attention_to_patches(model, ids, tokens, pixels, args.layer).view(-1, side, side)
        sheet = draw(model, data.load_image(args.image), [w for w, _ in parts],
                                  [grids[rows].mean(0) for _, rows in parts])
        try:
            sheet.save(args.attention)
        except (OSError, ValueError) as error:          # no such folder; no such kind of picture
            raise UserError(f"--attention {args.attention}: {error}: name a .png") from None
    if args.verbose:
        note(speed_line(model, places(model, ids, sizes), start, times, args.num_beams))
    return said.strip()


def main(args):
    """Cheap checks first: the picture, and only then the model."""
    sys.stdin.reconfigure(errors="surrogateescape")      # a bad byte is a complaint, not a crash
    sys.stdout.reconfigure(errors="replace")
    if os.path.isdir(args.image):
        files, others = list_pictures(args.image)
        for line in others:
            note(f"note: {line}")
        if not files:
            raise data.BadImage(f"{args.image}: holds no picture: give a folder with some "
                                f"({', '.join(FORMATS)})")
        return caption_folder(load_model(args, args.quantize), files, args, generate_batch)
    for path in args.images:
        data.load_image(path)
    model = load_model(args, args.quantize)
    picture = pictured(model, args.images)
    check_room(model, picture)
    if args.prompt is None:
        return chat(model, picture, args, print_answer)
    print_answer(model, [args.prompt], {0: picture}, args)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(ARGS), ARGS.debug))
