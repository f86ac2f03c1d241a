"""generate.py: talk to a model about an image.

    picture -- ViT, projector -+
                               splice -- prefill: the whole prompt at once --> logits -- sample
    question -- ids -----------+            | writes                             ^         |
                                            KV cache -- decode: one id a step ---+-- id ---+
                                                                              until </s>

Prefill is one pass over all positions of the prompt, the picture's included. Each later token is a
pass over one position: the keys and values of those before it are in the cache. The picture is seen
once. Prompts of different lengths share a batch by padding on the left:

    prompts                      attention_mask    position_ids
    . . . <s> USER : Hi          0 0 0 1 1 1 1     0 0 0 0 1 2 3        0: never attended to
    <s> USER : What is this      1 1 1 1 1 1 1     0 1 2 3 4 5 6        from the first real token

    temperature 0    the likeliest token, always         top-k   of the k likeliest only
    temperature t    drawn from softmax(logits / t)      top-p   of the likeliest that sum to p
    beams n          the n best beginnings side by side; the best mean log-probability wins

Decoding reads every weight once a token, so memory limits it and not arithmetic; a batch shares the
reading. Beams, stop texts, CUDA graphs, attention maps, chat and web page are in decoding/.
Letters: B batch, T tokens of a prompt, T' with the picture's, C width, V vocabulary.
Next: qformer.py, another way from a picture to vectors.
"""

import math
import os

if __name__ == "__main__":
    from decoding.flags import parse
    ARGS = parse()              # before torch is imported: --help answers at once
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # idle threads sleep

import sys
import time

import torch

from decoding.answer import Answer, Generation
from decoding.attention_map import save_attention
from decoding.beam import beam_search
from decoding.captions import caption_folder
from decoding.chat import accept_any_bytes, chat
from decoding.cuda_graph import can_capture, decode_graph
from decoding.flags import check_settings
from decoding.loading import load_model, speed_line
from decoding.logits import ids_seen, nan_error, repetition_penalty, written_so_far
from decoding.page import serve
from decoding.pictures import check_pictures, find_pictures, image_turns, join_batch
from decoding.pictures import join_pictures, load_groups
from decoding.prompt import answer_length, build_prompt, prompt_length, typed_questions
from decoding.stopping import AnswerEnd, cut_reason, limit_reason, Stops
from decoding.streaming import stream_text
from formats.errors import exit_status, note
from llama import KVCache

# ------------------------------------------------------------------------------------- prefill

def prefill_inputs(model, prompts, pictures, max_new_tokens, sizes=None):
    """Prompts side by side, padded on the left, each image id replaced by its picture's vectors.

    -> the language model, x (B, T', C), attention_mask (B, T'), how many ids may follow each.
    Raises BadData, UserError where a prompt and its pictures do not fit."""
    sizes, max_new = sizes or [None] * len(prompts), []
    for ids, pixels, size in zip(prompts, pictures, sizes, strict=True):
        max_new.append(answer_length(model, ids, pixels, size, max_new_tokens))
    llm = getattr(model, "llm", model)              # a bare llama.Llama is its own: text alone
    weight = llm.embed.weight                       # the inputs get its dtype and device

    T = max(map(len, prompts))
    padded = torch.zeros(len(prompts), T, dtype=torch.long)
    attention_mask = torch.zeros(len(prompts), T, dtype=torch.bool)
    for row, ids in enumerate(prompts):
        padded[row, T - len(ids):] = torch.tensor(ids)
        attention_mask[row, T - len(ids):] = True
    padded, attention_mask = padded.to(weight.device), attention_mask.to(weight.device)
    if llm is model:
        return llm, llm.embed(padded), attention_mask, max_new

    pixels, sizes = join_batch(pictures, sizes, weight)             # (pictures or tiles, 3, S, S)
    x, _, attention_mask = model.embed(padded, pixels, None, attention_mask, left=True,
                                       sizes=sizes, questions=typed_questions(prompts))
    return llm, x, attention_mask, max_new                          # x is longer: T' > T


# -------------------------------------------------------------------------------------- decode

def decode_steps(llm, x, attention_mask, cache, sampler, count):
    """Yield the ids of `count` steps, a list of B each. x (B, T', C): the prompt's embeddings.

    A step reads the filled part of the cache only. `decode_graph`, which GPUs take, reads all of it
    behind a mask: on a CPU 1.1 to 1.4 times slower (160M weights, one core, 32 to 256 tokens)."""
    lengths = attention_mask.sum(1, keepdim=True)                           # (B, 1), real tokens
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)              # (B, T')
    for step in range(count):
        ids = sampler(llm.next_logits(x, cache, position_ids, attention_mask))      # (B,)
        yield ids.tolist()
        # rows that have ended are computed on and ignored: cheaper than taking them out
        ids, position = ids[:, None], lengths + step                        # (B, 1)
        if cache is not None:
            x, position_ids = ids, position         # the cache holds all that came before
        else:
            x = torch.cat((x, llm.embed(ids)), 1)   # one position longer, and all computed again
            position_ids = torch.cat((position_ids, position), 1)
            attention_mask = torch.cat((attention_mask, torch.ones_like(ids).bool()), 1)


# -------------------------------------------------------------------------------------- sample

def uniforms(seed, rows, count):
    """(count, rows) numbers in [0, 1), fp64. Column i depends on seed + i alone, so a row of a
    batch draws the same as it would alone."""
    columns = []
    for row in range(rows):
        rng = torch.Generator().manual_seed(seed + row)     # on the CPU: GPUs draw other numbers
        columns.append(torch.randint(2 ** 50, (count,), generator=rng))
    return torch.stack(columns, 1).double() / 2 ** 50


def sample(logits, u=None, temperature=0.0, top_p=1.0, top_k=0):
    """One id a row: logits (V) or (B, V) -> () or (B). Temperature, then top-k, then top-p.

    Inverse-CDF sampling: the first id whose cumulative probability exceeds u, () or (B) in [0, 1).
    fp64, so one seed gives one answer on every device, without a sync. [top-p: 1904.09751]"""
    if not temperature:
        return logits.argmax(-1)                         # greedy
    x = logits.double()                                  # fp32 sums would depend on the device
    x = (x - x.amax(-1, keepdim=True)) / temperature     # at most 0: small temperatures are safe
    if 0 < top_k < x.shape[-1]:
        x = x.masked_fill(x < x.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        p, order = x.softmax(-1).sort(descending=True)
        late = p.cumsum(-1) - p >= top_p                 # those before it sum to top_p already
        x = x.masked_fill(late.scatter(-1, order, late), -math.inf)
    # whole multiples of 2^-50: sums are exact in any order, and what is left out has no share
    cdf = (x.softmax(-1) * 2 ** 50).long().cumsum(-1)
    # the number of ids whose cdf is at most u is the index of the first above it
    return (cdf <= (u * cdf[..., -1]).long()[..., None]).sum(-1)


class Sampler:
    """Chooses the next id in every row. All its state is on the device, and the random numbers of
    the whole answer are drawn up front, so a CUDA graph can replay it."""

    def __init__(self, llm, prompts, count, seed=0, temperature=0.0, top_p=1.0, top_k=0,
                 penalty=1.0):
        device = llm.embed.weight.device
        self.settings, self.penalty = (temperature, top_p, top_k), penalty
        self.u = self.seen = None
        if temperature:
            self.u = uniforms(seed, len(prompts), count).to(device)         # (count, B)
        if penalty != 1:
            self.seen = ids_seen(written_so_far(llm, prompts), llm.config.vocab, device)    # (B, V)
        self.step = torch.zeros(1, dtype=torch.long, device=device)

    def __call__(self, logits):
        """logits (B, V) -> ids (B), -1 where a row's logits are not numbers."""
        broken = ~logits.amax(-1).isfinite()            # the maximum of NaN and others is NaN
        logits = logits.masked_fill(broken[:, None], 0)
        if self.seen is not None:
            logits = repetition_penalty(logits, self.seen, self.penalty)
        # (B,); the device counts the steps
        u = None if self.u is None else self.u.index_select(0, self.step)[0]
        ids = sample(logits, u, *self.settings)
        self.step += 1
        if self.seen is not None:
            self.seen.scatter_(1, ids[:, None], True)   # from now on this id is penalized
        return ids.masked_fill(broken, -1)


# ------------------------------------------------------------------------------------- generate

def beam_rows(model, prompts, pictures, max_new_tokens, sizes, num_beams, stops, penalty, answers):
    """The best answer to each prompt by beam search. penalty: (of repetition, of length)."""
    rows, sizes = [], sizes or [None] * len(prompts)
    for ids, pixels, size, answer in zip(prompts, pictures, sizes, answers, strict=True):
        llm, x, _, (count,) = prefill_inputs(model, [ids], [pixels], max_new_tokens, [size])
        cache = KVCache(llm.config, 1, x.shape[1] + count, x)       # it grows to num_beams rows
        best = beam_search(llm, x, cache, ids, count, stops, num_beams, penalty[0],
                           limit_reason(count, max_new_tokens), penalty[1])
        answer.finish_reason, answer.rest = best.reason, best.rest
        rows.append(best.tokens)
    return rows


@torch.inference_mode()
def generate_rows(model, prompts, pictures, max_new_tokens=256, temperature=0.0, top_p=1.0,
                  top_k=0, num_beams=1, seed=0, eos=None, use_cache=True, sizes=None,
                  repetition_penalty=1.0, stop=(), length_penalty=1.0, answers=None):
    """Yield, for each step, the list of ids that each row adds: one; none when the row has ended,
    or waits until it is clear whether a stop text has begun; and then several. answers: an `Answer`
    for each row, which gets its finish_reason and rest."""
    check_settings(max_new_tokens, temperature, top_p, top_k, num_beams, repetition_penalty, stop,
                   length_penalty)
    stops = Stops(model, eos, stop)                 # stop ids and stop texts
    answers = answers or [Answer() for _ in prompts]
    if num_beams > 1:
        yield beam_rows(model, prompts, pictures, max_new_tokens, sizes, num_beams, stops,
                        (repetition_penalty, length_penalty), answers)
        return
    llm, x, attention_mask, max_new = prefill_inputs(model, prompts, pictures, max_new_tokens,
                                                     sizes)
    longest, cache, decode = max(max_new), None, decode_steps
    if use_cache:                                   # without: the same, and slow
        cache = KVCache(llm.config, len(x), x.shape[1] + longest, x, attention_mask)
        decode = decode_graph if can_capture(x) and llm.can_capture else decode_steps
    sampler = Sampler(llm, prompts, longest, seed, temperature, top_p, top_k, repetition_penalty)
    ends = [AnswerEnd(stops, count, max_new_tokens, answer)     # rows of a batch end one by one
            for count, answer in zip(max_new, answers)]
    for ids in decode(llm, x, attention_mask, cache, sampler, longest):
        if min(ids) < 0:                            # a row has logits that are not numbers
            raise nan_error(llm)
        new = [end.add(token) for end, token in zip(ends, ids)]
        done = all(end.done for end in ends)
        if any(new) or not done:                    # the last step may add nothing: its end token
            yield new
        if done:
            return


def generate(model, ids, pixels=None, max_new_tokens=256, temperature=0.0, top_p=1.0, top_k=0,
             num_beams=1, seed=0, eos=None, use_cache=True, sizes=None, repetition_penalty=1.0,
             stop=(), length_penalty=1.0):
    """`Generation`: iterator of the token ids that follow the prompt, without the end token.

    model: a VLM, or a llama.Llama for text; ids: list of int, data.IMAGE for a picture; pixels
    (n, 3, S, S), one for each, or all their tiles with sizes [(width, height)]. eos: an id or a set
    that ends the answer, instead of the model's own. stop: texts before which it ends.
    length_penalty: see decoding/beam.py. Beams come all at once, and always use the cache.
    Raises, with the first token, UsageError, BadModel for NaN, and as `prefill_inputs` does."""
    answer = Answer()
    sizes = None if sizes is None else [sizes]      # a batch of one row
    rows = generate_rows(model, [ids], [pixels], max_new_tokens, temperature, top_p, top_k,
                         num_beams, seed, eos, use_cache, sizes, repetition_penalty, stop,
                         length_penalty, [answer])
    return Generation(rows, answer)


def generate_batch(model, prompts, pictures=None, **settings):
    """[`Answer`]: what `generate` says to each prompt, computed side by side; row i has seed + i.

    pictures: for each prompt pixels (n, 3, S, S) or None; sizes: for each prompt a list or None;
    settings as for `generate`."""
    answers, pictures = [Answer() for _ in prompts], pictures or [None] * len(prompts)
    if not prompts:
        return answers
    for rows in generate_rows(model, prompts, pictures, **settings, answers=answers):
        for answer, new in zip(answers, rows):
            answer += new                           # an Answer is a list of ids
    return answers


def stream(model, ids, pixels=None, **settings):
    """The answer as text, piece by piece; settings as for `generate`."""
    return filter(None, stream_text(generate(model, ids, pixels, **settings), model.tokenizer))


# -------------------------------------------------------------------------------- command line

def print_answer(model, turns, groups, args):
    """Print the answer to the last turn as it is written, and return it.

    groups: {turn: the pictures in front of it}, see decoding/pictures.py."""
    ids = build_prompt(turns, model.template, model.tokenizer, image_turns(groups))
    pixels, sizes = join_pictures(groups)
    t0 = time.perf_counter()
    answer = generate(model, ids, pixels, seed=args.seed, sizes=sizes, **args.settings)
    text = ""
    for piece in stream_text(answer, model.tokenizer):
        print(piece, end="", flush=True)            # piece by piece, as it is written
        text += piece
    print(flush=True)
    if why := cut_reason(answer.finish_reason, model, args.max_new_tokens):
        note(f"note: the answer is {why}")
    if args.attention:                              # computed again from the whole answer
        save_attention(args.attention, model, args.image, ids, answer.tokens, pixels, args.layer)
    if args.verbose:
        note(speed_line(model, prompt_length(model, ids, sizes), t0, answer.times, args.num_beams))
    return text.strip()


def main(args):
    """Cheap checks first: the pictures, and only then the model."""
    accept_any_bytes()
    if args.page:                                   # asked in a browser, until Ctrl-C
        return serve(args, generate)
    if os.path.isdir(args.image):
        files = find_pictures(args.image)           # a folder: the same question about all
        return caption_folder(load_model(args, args.quantize), files, args, generate_batch)
    check_pictures(args.images)
    model = load_model(args, args.quantize)
    groups = load_groups(model, args.images)        # and the context has room for them
    if args.prompt is None:                         # no question: a chat
        return chat(model, groups, args, print_answer)
    print_answer(model, [args.prompt], groups, args)


if __name__ == "__main__":
    sys.exit(exit_status(lambda: main(ARGS), ARGS.debug))
