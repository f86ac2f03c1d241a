"""exercises.of_rows: exercises 4, 5 and 11, from a conversation to a row with labels and weights.

For each: the project's own function in the exercise's signature, small inputs, classic mistakes.
"""
from pathlib import Path

import torch

import data
import projector
from data import IGNORE, IMAGE, Segment
from exercises.checking import Exercise
from trainer.loader import token_weights

TOY = Path(__file__).parents[1] / "toy/weights/llama"


# ------------------------------------------------------------------------------ 4: label mask

def label_mask(segments, tokenizer):
    pieces = [Segment(text, learn) for text, learn in segments]
    return data.tokenize_segments([Segment("", start="bos"), *pieces], tokenizer)


def label_cases():
    tokenizer = data.Tokenizer(TOY)
    talks = ([(0, "What colour is the star?"), (1, "The star is red.")],
             [(0, "How many objects are there?"), (1, "One top left, so one."),
              (0, "Is there a blue circle?"), (1, "No.")])
    cases = []
    for turns in talks:
        found = data.segments(turns, data.template_of("v1"), training=True)
        cases.append(([(part.text, part.learn) for part in found if not part.start], tokenizer))
    # a token that crosses a border of loss: " The" begins in the prompt's last space, " circle" in
    # the piece with loss and ends behind it
    crossing = [("USER: What is it? ASSISTANT: ", False), ("The star is a cir", True),
                ("cle. USER: Sure? ASSISTANT: ", False), ("Yes.", True), ("</s>", True)]
    return [*cases, (crossing, tokenizer)]


def token_at(arguments, name, place):
    """The text of a token, of which the line names only the id."""
    segments, tokenizer = arguments
    text = tokenizer.token(label_mask(segments, tokenizer)[0][place[0]]).replace("▁", " ")
    return f", the token {text!r},"


def relabelled(change):
    """A mistake that starts from the right ids and labels."""
    def mistake(segments, tokenizer):
        ids, labels = label_mask(segments, tokenizer)
        return ids, change(list(ids), list(labels))
    return mistake


def spans_of(labels):
    """[(first, last + 1)] of the stretches with loss."""
    marks, spans = [label != IGNORE for label in [IGNORE, *labels, IGNORE]], []
    for at in range(1, len(marks)):
        if marks[at] and not marks[at - 1]:
            spans.append([at - 1, None])
        if marks[at - 1] and not marks[at]:
            spans[-1][1] = at - 1
    return spans


def moved_spans(first=0, last=0, which=slice(None)):
    """Labels whose stretches begin and end so many tokens later; which: of the stretches."""
    def change(ids, labels):
        out = [IGNORE] * len(ids)
        for a, b in spans_of(labels)[which]:
            a, b = a + first, min(b + last, len(ids))
            out[a:b] = ids[a:b]
        return out
    return relabelled(change)


def exchanged(ids, labels):
    return [IGNORE if label != IGNORE else i for i, label in zip(ids, labels)]


def other_ignore(value, first=0):
    """Another number than IGNORE, from the label `first` on."""
    return relabelled(lambda ids, labels: [
        *labels[:first], *(value if x == IGNORE else x for x in labels[first:])])


def piece_by_piece(segments, tokenizer):
    ids, labels = [tokenizer.bos], [IGNORE]
    for text, learn in segments:
        new = tokenizer.encode(text, bos=False)
        ids += new
        labels += new if learn else [IGNORE] * len(new)
    return ids, labels


def by_characters(choose):
    """Labels for which not the first character decides; choose: any, all, or the last of them."""
    def mistake(segments, tokenizer):
        text = "".join(text for text, _ in segments)
        learn = [learn for text, learn in segments for _ in text]
        pairs = tokenizer.encode_with_offsets(text)
        ids, labels = [tokenizer.bos], [IGNORE]
        for (token, first), (_, after) in zip(pairs, [*pairs[1:], (0, len(text))]):
            ids.append(token)
            labels.append(token if choose(learn[first:max(after, first + 1)]) else IGNORE)
        return ids, labels
    return mistake


def last_piece(segments, tokenizer):
    """Loss on the last piece that has it: often the end token alone."""
    last = max(i for i, (_, learn) in enumerate(segments) if learn)
    return label_mask([(text, i == last) for i, (text, _) in enumerate(segments)], tokenizer)


def without_bos(segments, tokenizer):
    ids, labels = label_mask(segments, tokenizer)
    return ids[1:], labels[1:]


PROMPT = ("the label stands on the prompt, too: the model would learn to ask. Only the answers "
          "have loss")
NO_LOSS_0 = "where there is no loss the label is 0: 0 is a token, too; take IGNORE, -100"
NO_LOSS_1 = ("where there is no loss the label is -1: cross-entropy passes over -100 only; take "
             "IGNORE")
FIRST_DECIDES = "of a token that crosses a border the first character decides: here "
SHIFTED = "the labels are shifted by one: label t is the id at t, the loss does the shift itself"
LABELS = Exercise(
    4, "ex04_label_mask.py", ("label_mask",), "tokenize_segments in data.py", label_mask,
    label_cases,
    # these three first: in the last input alone they are like a mask that begins too early or late
    ((FIRST_DECIDES + "the last one does", by_characters(lambda learn: learn[-1])),
     (FIRST_DECIDES + "one with loss is enough", by_characters(any)),
     (FIRST_DECIDES + "all of them must have loss", by_characters(all)),
     (PROMPT, relabelled(lambda ids, labels: ids)),
     (PROMPT, relabelled(lambda ids, labels: [IGNORE, *ids[1:]])),
     ("the mask is the wrong way round: the questions have loss, the answers have none",
      relabelled(exchanged)),
     ("the mask is the wrong way round: the questions have loss, the answers have none",
      relabelled(lambda ids, labels: [IGNORE, *exchanged(ids, labels)[1:]])),
     (SHIFTED, relabelled(lambda ids, labels: [*labels[1:], IGNORE])),
     (SHIFTED, relabelled(lambda ids, labels: [IGNORE, *labels[:-1]])),
     ("the end token has no loss: the model would never learn to stop", moved_spans(last=-1)),
     ("off by one: the mask begins one token late, the first token of an answer has no loss",
      moved_spans(first=1)),
     ("off by one: the mask begins one token early, on the prompt's colon", moved_spans(first=-1)),
     ("off by one: the mask ends one token late, behind the end token", moved_spans(last=1)),
     ("the whole mask lies one token late", moved_spans(1, 1)),
     ("the whole mask lies one token early", moved_spans(-1, -1)),
     ("only the last answer has loss: each answer has", moved_spans(which=slice(-1, None))),
     ("only the first answer has loss: each answer has", moved_spans(which=slice(1))),
     ("only the last piece has loss: each piece of an answer has", last_piece),
     (NO_LOSS_0, other_ignore(0)), (NO_LOSS_0, other_ignore(0, first=1)),
     (NO_LOSS_1, other_ignore(-1)), (NO_LOSS_1, other_ignore(-1, first=1)),
     ("the pieces are tokenized one by one: join the texts first, a token may reach over the end "
      "of a piece", piece_by_piece),
     ("BOS is missing in front", without_bos),
     ("BOS has loss: in v1 nothing stands before it that could predict it (BLIP-2's template puts "
      "the picture there, and does train BOS)",
      relabelled(lambda ids, labels: [ids[0], *labels[1:]]))),
    ("ids", "labels"), element=token_at)


# ------------------------------------------------------------------------------ 5: splice

def splice(ids, text_embeds, image_embeds, labels):
    x, spliced, _ = projector.splice(ids[None], text_embeds[None], image_embeds, labels[None])
    return x[0], spliced[0]


def splice_cases():
    rng, cases = torch.Generator().manual_seed(5), []
    for row, sizes in (([1, 5, IMAGE, 7, 8, 9], (3,)), ([IMAGE, 4, IMAGE, 6, 7], (2, 4)),
                       ([1, 6, 7], ())):
        ids = torch.tensor(row)
        labels = ids.where(torch.arange(len(row)) >= len(row) - 2, IGNORE)
        pictures = [torch.randn(size, 4, generator=rng) for size in sizes]
        cases.append((ids, torch.randn(len(row), 4, generator=rng), pictures, labels))
    return cases


def joined(ids, text_embeds, image_embeds, labels, put):
    """The row piece by piece; put(at, picture) -> (vectors, labels) in the place of an IMAGE."""
    rows, out, pictures = [], [], iter(image_embeds)
    for at, i in enumerate(ids.tolist()):
        x, y = text_embeds[at:at + 1], labels[at:at + 1]
        if i == IMAGE:
            x, y = put(at, next(pictures))
        rows.append(x)
        out.append(y)
    return torch.cat(rows), torch.cat(out)


def labelled(value):
    """The right row; at a picture the labels are `value`."""
    def mistake(ids, text_embeds, image_embeds, labels):
        return joined(ids, text_embeds, image_embeds, labels,
                      lambda at, x: (x, labels.new_full((len(x),), value)))
    return mistake


def kept_row(before):
    """IMAGE's own row stays, before or behind the picture."""
    def mistake(ids, text_embeds, image_embeds, labels):
        def put(at, x):
            own = text_embeds[at:at + 1]
            rows = (own, x) if before else (x, own)
            return torch.cat(rows), labels.new_full((1 + len(x),), IGNORE)
        return joined(ids, text_embeds, image_embeds, labels, put)
    return mistake


def at_an_end(front):
    """All pictures in front of the row, or behind it."""
    def mistake(ids, text_embeds, image_embeds, labels):
        text, pictures = ids != IMAGE, torch.cat([text_embeds[:0], *image_embeds])
        x, y = [text_embeds[text], pictures], [labels[text], labels.new_full((len(pictures),),
                                                                             IGNORE)]
        step = -1 if front else 1
        return torch.cat(x[::step]), torch.cat(y[::step])
    return mistake


def late(ids, text_embeds, image_embeds, labels):
    """Each picture one token too late: an IMAGE and what follows it change places."""
    order = list(range(len(ids)))
    for at in (ids == IMAGE).nonzero().flatten().tolist():
        order[at:at + 2] = order[at:at + 2][::-1]
    return splice(ids[order], text_embeds[order], image_embeds, labels[order])


def unmoved_labels(ids, text_embeds, image_embeds, labels):
    x, _ = splice(ids, text_embeds, image_embeds, labels)
    return x, torch.cat((labels, labels.new_full((len(x) - len(labels),), IGNORE)))


def one_vector(ids, text_embeds, image_embeds, labels):
    return splice(ids, text_embeds, [x[:1] for x in image_embeds], labels)


SPLICE = Exercise(
    5, "ex05_splice.py", ("splice",), "splice in projector.py", splice, splice_cases,
    (("the row of the IMAGE token itself is still there: the vectors stand in its place, and "
      "T - 1 + P are left", kept_row(True)),
     ("the row of the IMAGE token itself is still there: the vectors stand in its place, and "
      "T - 1 + P are left", kept_row(False)),
     ("the pictures stand in front of the row: each belongs where its IMAGE is", at_an_end(True)),
     ("the pictures stand behind the row: each belongs where its IMAGE is", at_an_end(False)),
     ("off by one: the picture stands behind the token that follows its IMAGE", late),
     ("the labels did not move with their tokens: IGNORE belongs where the picture is, P times",
      unmoved_labels),
     ("the labels did not grow with the row", lambda ids, text_embeds, image_embeds, labels: (
         splice(ids, text_embeds, image_embeds, labels)[0], labels)),
     ("a picture's labels are 0: 0 is a token; what a picture says has no loss, take IGNORE",
      labelled(0)),
     ("a picture's labels are IMAGE, -200: the loss passes over IGNORE, -100, only",
      labelled(IMAGE)),
     ("the pictures are in the wrong order: the first belongs to the first IMAGE",
      lambda ids, text_embeds, image_embeds, labels: splice(ids, text_embeds, image_embeds[::-1],
                                                            labels)),
     ("only the first vector of each picture is in the row: a picture has P", one_vector)),
    ("row", "labels"))


# ------------------------------------------------------------------------------ 11: weights

def weight_cases():
    return [([3, 1, 2, 2], 2), ([3, 1, 2, 0], 2), ([5, 1, 2, 2, 4, 1], 3), ([0, 0, 7, 2], 2),
            ([4, 2, 6], 1)]


def weighed(weight):
    """weight(tokens of the sample, of its group, of the step, samples in a group, groups)."""
    def mistake(learned, groups):
        size, out = len(learned) // groups, []
        for i, tokens in enumerate(learned):
            group = learned[i // size * size:i // size * size + size]
            out.append(weight(tokens, sum(group), sum(learned), size, groups))
        return out
    return mistake


def interleaved(learned, groups):
    sums = [sum(learned[first::groups]) for first in range(groups)]
    return [1 / (groups * sums[i % groups]) if sums[i % groups] else 0.
            for i in range(len(learned))]


WEIGHTS = Exercise(
    11, "ex11_token_weights.py", ("token_weights",), "token_weights in trainer/loader.py",
    token_weights, weight_cases,
    (("that is the mean over all tokens of the step: officially each group has its own mean, and "
      "a group of short answers counts as much as one of long answers",
      weighed(lambda own, group, step, size, groups: 1 / step)),
     ("that is the mean over samples: inside a group all tokens weigh the same, a long answer "
      "more than a short one", weighed(
          lambda own, group, step, size, groups: own and 1 / (groups * size * own))),
     ("the weights of a step add up to the number of groups, not to 1: divide by `groups`",
      weighed(lambda own, group, step, size, groups: group and 1 / group)),
     ("that is the mean over the samples of a group: divide by its tokens with loss",
      weighed(lambda own, group, step, size, groups: group and 1 / (groups * size))),
     ("the groups are interleaved: a group is so many samples in a row", interleaved)),
    ("weights",))

EXERCISES = (LABELS, SPLICE, WEIGHTS)
