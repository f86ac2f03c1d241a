"""What waits in the host's memory, what of it visits the GPU, and what passes between the two.

    --offload-optimizer    moments and masters: fetched and sent back once a step
    --offload-gradients    their sums: sent after each micro-batch but the last, fetched in each but
                           the first. A step of one micro-batch sums nothing
    --offload              what --checkpoint keeps: sent in forward, fetched in backward

kernels/host_state.py and kernels/offload.py do it. Computed; not run on a GPU by us."""

# weights whose numbers are on the GPU at once: one that comes, one at work, one that goes; of
# gradients one more, because a sum comes to a gradient that is there
VISITORS = {"moments": 3, "masters": 3, "gradients": 4}


def has_one_micro_batch(args):
    """Is every step one micro-batch, whatever the samples are?"""
    return args.row.batch == 1 or not args.pack and args.accum == 1


def steps_in_backward(args):
    """Is a weight stepped when its gradient is complete? trainer/step.py"""
    return args.optimizer == "adamw8" and not args.row.clip


def split_by_place(sizes, model, args):
    """Of {what: bytes} of the trained weights' numbers: ({what: bytes} on the GPU, on the host)."""
    here, there = dict(sizes), {}
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    largest = max(trained) / sum(trained)               # the share of the largest weight
    moved = {"moments": args.offload_optimizer, "masters": args.offload_optimizer,
             "gradients": args.offload_gradients}
    if steps_in_backward(args) and has_one_micro_batch(args):
        # freed one by one: one that is complete, and one that waits for its moments
        here["gradients"] = min(sizes["gradients"], 2 * largest * sizes["gradients"])
        moved["gradients"] = False
    for name, is_moved in moved.items():
        if is_moved and sizes[name]:
            there[name] = sizes[name]
            here[name] = min(sizes[name], VISITORS[name] * largest * sizes[name])
    return here, there


def bytes_a_step(host, micro_batches):
    """{what: bytes} over PCIe in a step, both ways together; host: {what: bytes} that wait there,
    activations those of one micro-batch."""
    passes = {"moments": 2, "masters": 2, "gradients": 2 * (micro_batches - 1),
              "activations": 2 * micro_batches}
    return {name: passes[name] * size for name, size in host.items()}
