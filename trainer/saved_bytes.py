"""What autograd keeps for backward in a run's first micro-batch, beside what was forecast."""

import torch

from trainer.distributed import world_size
from trainer.forecast import activation_bytes, static_bytes


def measure_saved_bytes(loss, model, args):
    """Wraps loss(micro-batch) so that the first one records the bytes that autograd saves.

    Returns (wrapped loss, report()), which prints them beside the forecast."""
    record = SavedBytes(model, args)

    def wrapped(micro):
        if record.is_done or world_size() > 1:      # a rank's layers are whole only while they run
            return loss(micro)
        with torch.autograd.graph.saved_tensors_hooks(record.pack, lambda x: x):
            value = loss(micro)
        record.close(micro)
        return value
    return wrapped, record.report


class SavedBytes:
    """The memory that autograd saves in one forward, by address, and what was forecast of it."""

    def __init__(self, model, args):
        self.model, self.args = model, args
        self.found, self.forecast, self.is_done = {}, None, False

    def pack(self, x):
        memory = x.untyped_storage()
        self.found[memory.data_ptr()] = memory.nbytes()
        return x.detach()

    def close(self, micro):
        """The forward is over: leave out the weights, and work out the forecast."""
        model, args, self.is_done = self.model, self.args, True
        device, stream = micro.ids.device.type, model.llm.embed.weight.element_size()
        if device == "cpu" and micro.lengths:       # PyTorch keeps a mask of T² a layer
            return
        product = 2 if torch.is_autocast_enabled(device) else stream
        text, learned, pictures = zip(*micro.counts)
        sizes = [t + n * model.num_image_tokens() for t, n in zip(text, pictures)]
        tokens = sum(sizes) if micro.lengths else len(sizes) * max(sizes)
        self.forecast = activation_bytes(
            model, tokens, sum(learned), sum(pictures), args.checkpoint, stream, product,
            device == "cuda", args.offload and device == "cuda")
        for p in (*model.parameters(), *model.buffers()):       # buffers: coded weights
            self.found.pop(p.untyped_storage().data_ptr(), None)

    def report(self):
        if not self.forecast:
            return
        print(f"kept for backward: {sum(self.found.values()) / 1e6:,.1f} MB, forecast "
              f"{self.forecast[0] / 1e6:,.1f} MB")
        if self.model.llm.embed.weight.is_cuda:
            forecast = sum(static_bytes(self.model, self.args).values()) + sum(self.forecast)
            print(f"peak memory: {torch.cuda.max_memory_allocated() / 1e9:,.2f} GB, forecast "
                  f"{forecast / 1e9:,.2f} GB")
