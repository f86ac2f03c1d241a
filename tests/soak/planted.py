"""Controls: faults planted into the program, which the soak must find. Each function takes the
module train, and changes what the coming run calls."""

import json
import shutil

import torch

from trainer import checkpoint, run_folder

KEPT = []


def non_atomic_model(train):
    """The finished model gets its name first and its files one by one."""
    def move(tmp, final):
        final.mkdir()
        for path in sorted(tmp.iterdir()):
            path.rename(final / path.name)
        tmp.rmdir()
    run_folder.rename_into_place = move


def checkpoint_in_place(train):
    """A checkpoint is written over the one before, file by file, without checksums."""
    checkpoint.sha256_file = lambda path: ""

    def save(job, out, step, keep):
        weights, state = checkpoint.gather_weights(job), checkpoint.gather_state(job)
        before = sorted(out.glob("step-??????"))
        folder = before[-1] if before else out / f"step-{step:06d}"
        folder.mkdir(exist_ok=True)
        checkpoint.save_file(weights, folder / "trained.safetensors")
        checkpoint.save_file(state, folder / "optimizer.safetensors")
        sums = {"trained.safetensors": "", "optimizer.safetensors": ""}
        (folder / "trainer.json").write_text(json.dumps({"step": step, "sha256": sums}))
        if before:
            shutil.move(folder, out / f"step-{step:06d}")
    run_folder.save_checkpoint = save


def unseeded_step(train):
    """Each step draws from PyTorch's own generator, whose state no checkpoint keeps: undisturbed
    runs agree with each other, a resumed one does not."""
    real = train.lr_schedule

    def noisy(row, steps):
        scale = real(row, steps)
        return lambda step: scale(step) * (1 + .1 * float(torch.rand(())))
    train.lr_schedule = noisy


def leak(train):
    """A step keeps 64 KB for ever."""
    real = train.GradientStep.step

    def step(gradients):
        KEPT.append(torch.ones(16384))
        real(gradients)
    train.GradientStep.step = step
