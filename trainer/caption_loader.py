"""Micro-batches of BLIP-2's first stage: pictures and captions, no conversations, no LLaMA."""

import torch

import data
from formats.conversations import blip_caption
from formats.errors import UserError


class CaptionBatches:
    """step -> micro-batches (pixels, ids, mask, seed) of BLIP-2's first stage: pictures, captions.

    seed: the index of the first sample; the negatives are drawn by it."""

    def __init__(self, samples, model, args, device):
        self.samples, self.tokenizer, self.image_size = samples, model.tokenizer, model.image_size
        self.row, self.accum, self.device = args.row, args.accum, device

    def __call__(self, step):
        size = self.row.batch // self.accum
        first = step * self.row.batch
        return [self.micro_batch(first + m * size, size) for m in range(self.accum)]

    def micro_batch(self, first, size):
        pixels, texts = [], []
        for index in range(first, first + size):
            image, text = self.pair(index)
            pixels.append(data.preprocess(image, self.image_size, self.row.image_aspect))
            texts.append(text)
        ids, mask = self.tokenizer.encode(texts)
        return torch.cat(pixels).to(self.device), ids.to(self.device), mask.to(self.device), first

    def pair(self, index):
        """(picture, caption) of a sample. Raises UserError with its name."""
        try:
            picture, conversation = self.samples[index]
            if picture is None:
                raise data.BadData("no picture; BLIP-2 learns from pictures and captions")
            text = blip_caption(conversation[-1]["value"])
            self.tokenizer.encode(text)             # refuses a caption without a word
        except UserError as error:
            raise type(error)(f"{self.samples.name(index)}: {error}") from None
        return picture, text
