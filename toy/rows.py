"""toy.rows: what one step of the toy's LLaMA reads, as ids and loss weights (stage 0).

    notes_row           a scene as notes in words, then questions about it or a description
    word_picture_row    the same with 64 tuples of words where a picture's patches will stand
    swap_words          either with other tokens in place of most colours and shapes
    stack_rows          rows -> ids (B, T, 5), weights (B, T)

Next: toy/parts.py, the training that reads them.
"""
import math
import random

import torch

import data
from toy.phrases import notes, word_picture
from toy.texts import captions, description, dialogue, KIND_WEIGHTS
from toy.world import COLOURS, SHAPES, training_scene

SWAPPED = .15                   # share of the rows whose colours and shapes are other tokens


def loss_weights(labels):
    """Answers count fully, everything else a twentieth: the notes' words cannot be predicted."""
    return [.05 if label == data.IGNORE else 1. for label in labels]


def swap_words(row, tokenizer, rng):
    """The same (ids, loss weights), most of its colours and shapes replaced by other tokens.

    What a "blarg" is can only be copied from the picture: so the model does not learn which shape
    goes with which colour, and a pair that it has never seen is no worse than any other."""
    ids, weights = row
    swapped = {}
    for word in (*COLOURS, *SHAPES):
        if rng.random() < .7:
            swapped[tokenizer.encode(word, bos=False)[0]] = rng.randrange(259, len(tokenizer))
    found = []
    for entry in ids:
        if isinstance(entry, tuple):
            found.append(tuple(swapped.get(i, i) for i in entry))
        else:
            found.append(swapped.get(entry, entry))
    return found, weights


def conversation(pairs):
    """[(question, answer)] as turns in LLaVA's layout."""
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return turns


def notes_row(i, tokenizer, weights=KIND_WEIGHTS):
    """(ids, loss weights) of scene i as notes, then questions about it or another description.

    weights: how often each kind of question is asked."""
    scene, rng = training_scene(i), random.Random(f"row:{i}")
    known, swap = notes(scene, rng), rng.random() < SWAPPED
    if swap or rng.random() < .2:
        text = description(scene)
        if not swap:
            text = rng.choice(captions(scene) + [text] * 5)
        first, second = tokenizer.encode(known + "\n"), tokenizer.encode(text + "\n", bos=False)
        row = first + second, [.05] * len(first) + [1.] * len(second)
        return swap_words(row, tokenizer, rng) if swap else row
    talk = conversation(dialogue(scene, rng, 8, weights))
    talk[0]["value"] = f"{known}\n{talk[0]['value']}"
    ids, labels = data.encode(talk, "v1", tokenizer, has_image=False)
    return ids, loss_weights(labels)


def word_picture_row(i, tokenizer, weights=KIND_WEIGHTS):
    """(ids, loss weights) of scene i as a word picture, then questions or a description.

    In place of a picture stand 64 tuples, each with the ids of one patch's words. The model reads
    the sum of their embeddings, and has no loss there."""
    scene, rng = training_scene(i), random.Random(f"blend:{i}")
    patches = [tuple(tokenizer.encode(text, bos=False)) for text in word_picture(scene, rng)]
    swap = rng.random() < SWAPPED
    if swap or rng.random() < .4:
        text = description(scene)
        if not swap:
            text = rng.choice(captions(scene) + [text] * 5)
        pairs, template = [("<image>", text)], "plain"
    elif rng.random() < .15:                    # MiniGPT-4's turns, as Vicuna v0 has read them
        question, answer = dialogue(scene, rng, 1, weights, described=.7)[0]
        pairs, template = [(f"<image>\n{question}", answer)], "minigpt4"
    else:
        pairs, template = dialogue(scene, rng, 7, weights), "v1"
        pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
    ids, labels = data.encode(conversation(pairs), template, tokenizer)
    at, counted = ids.index(data.IMAGE), loss_weights(labels)
    row = (ids[:at] + patches + ids[at + 1:],
           counted[:at] + [0.] * len(patches) + counted[at + 1:])
    return swap_words(row, tokenizer, rng) if swap else row


MOST_WORDS = 5                              # of a patch: size, colour, shape, row, column


def pad_words(entry):
    """An id, or a tuple of ids -> MOST_WORDS ids, -1 for none."""
    words = list(entry) if isinstance(entry, tuple) else [entry]
    return (words + [-1] * MOST_WORDS)[:MOST_WORDS]


def stack_rows(rows):
    """[(ids, weights)] -> ids (B, T, 5) and weights (B, T), padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    length = math.ceil(longest / 32) * 32 + 1       # few different lengths: few compilations
    all_ids, all_weights = [], []
    for ids, weights in rows:
        padding = length - len(ids)
        all_ids.append([pad_words(x) for x in ids] + [[-1] * MOST_WORDS] * padding)
        all_weights.append(weights + [0.] * padding)
    return torch.tensor(all_ids), torch.tensor(all_weights)
