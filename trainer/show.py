"""--show-batch N: samples as the model reads them, before a run is started."""

import data
from formats.adapters import open_model
from formats.errors import NothingToLearn, UserError
from trainer.forecast import meta_model
from trainer.loader import MicroBatches, Samples
from trainer.start import llm_folder


def show_batch(args, set_trainable):
    """Print the run's first samples: tokens with loss in colour (in brackets off a terminal).

    What a run would refuse is refused here, with the same message."""
    samples = Samples(args)
    model = meta_model(args, set_trainable)             # sizes only: no weights are loaded
    model.tokenizer = data.Tokenizer(open_model(llm_folder(args))[0])
    batches = MicroBatches(samples, model, args)
    for index in range(args.show_batch):
        try:
            problem = samples.fault(index)            # found when the file was read
            if problem:
                raise data.BadData(problem)
            ids, labels = batches.text(index)
            batches.pixels(index)
        except NothingToLearn as error:
            print(f"sample {index}: teaches nothing: {error}")
        except UserError as error:
            if args.on_bad_sample == "error":
                raise
            print(f"sample {index}: left out: {error}")
        else:
            print_sample(index, ids, labels, model.tokenizer)


def print_sample(index, ids, labels, tokenizer):
    """One sample: its size, then its tokens."""
    images, also = ids.count(data.IMAGE), ""
    if images == 1:
        also = " and a picture"
    if images > 1:
        also = f" and {images} pictures"
    print(f"sample {index}: {len(ids) - images} tokens{also}")
    print(data.colour_labels(ids, labels, tokenizer))
