"""--offload-optimizer and --offload-gradients: the same bits as without them."""

import copy
import signal
import weakref
from collections import deque
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import llama
import train
from test_train import ADAMW8, album, flags, here, lines, parts, run  # noqa: F401
from test_train import server, sha, unchanged_process  # noqa: F401
from tiny import shaken
from kernels import adamw, host_state
from kernels.adamw import AdamW
from kernels.host_state import host_memory, HostMemory, HostSums, Visit
from kernels.offload import Arena
from train import parse_args as parse
from trainer import step
from trainer.run_folder import Run

BOTH = "--offload-optimizer", "--offload-gradients"
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------- the optimizer alone

def weights_of(dtype):
    dice = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=dice).to(dtype))
            for shape in ((40, 50), (300,), (7, 1))]


def stepped(optimizer, weights, steps, seed=1):
    """Gradients of bf16 and several sizes; of the second weight none in every third step."""
    dice = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(weights):
            p.grad = torch.randn(p.shape, generator=dice).to(p.dtype)
            if i == 1 and t % 3 == 2:
                p.grad = None
        if t % 2:
            optimizer.fetch_ahead()             # asked for ahead, or when it is used
        optimizer.step()


def same(a, b):
    """Weights and states of two optimizers, bit by bit."""
    pairs = zip(a.param_groups[0]["params"], b.param_groups[0]["params"])
    return all(torch.equal(p, q) and a.state[p].keys() == b.state[q].keys()
               and all(map(torch.equal, a.state[p].values(), b.state[q].values()))
               for p, q in pairs)


@pytest.mark.parametrize("dtype, stochastic", [
    (torch.bfloat16, False), (torch.bfloat16, True), (torch.float32, False)],
    ids=["split", "stochastic", "fp32"])
def test_states_on_the_host_are_the_states_on_the_device(dtype, stochastic):
    ends = []
    for offload in (False, True):
        weights = weights_of(dtype)
        ends.append(AdamW(weights, 1e-2, stochastic=stochastic, offload=offload))
        stepped(ends[-1], weights, 7)
    assert same(*ends)
    # a copy goes on as the original does, and a saved state where it was saved
    for other in (copy.deepcopy(ends[1]), None):
        if other is None:
            fresh = [torch.nn.Parameter(p.detach().clone()) for p in
                     ends[1].param_groups[0]["params"]]
            other = AdamW(fresh, 1e-2, stochastic=stochastic, offload=True)
            other.load_state_dict(ends[1].state_dict())
        assert other.offload and same(ends[1], other)
        one = copy.deepcopy(ends[0])
        for adam in (one, other):
            stepped(adam, adam.param_groups[0]["params"], 2, seed=5)
        assert same(one, other) and not same(other, ends[0])
    if dtype == torch.bfloat16:
        p, q = (end.param_groups[0]["params"][0] for end in ends)
        assert torch.equal(ends[0].master(p), ends[1].master(q))


def test_states_that_are_not_sent_back_are_noticed(monkeypatch):
    """Control: without the way back every step starts from zeros."""
    monkeypatch.setattr(HostMemory, "send", lambda self, here, tensors: None)
    ends = []
    for offload in (False, True):
        weights = weights_of(torch.bfloat16)
        ends.append(AdamW(weights, 1e-2, offload=offload))
        stepped(ends[-1], weights, 2)
    assert not same(*ends)


def test_sums_are_added_as_autograd_adds_them():
    """bf16 sums of 9 gradients, by backward on the device and on the host; and one less is seen."""
    dice, sums = torch.Generator().manual_seed(0), HostSums(CPU)
    grads = torch.randn(9, 300, generator=dice).bfloat16()
    p, q = (torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16)) for _ in range(2))
    for i, grad in enumerate(grads):
        (p * grad).sum().backward()
        (q * grad).sum().backward()
        sums.fetch(q)
        sums.add(q)
        if i < 8:
            assert not torch.equal(p.grad, grads[:i].float().sum(0).bfloat16())
            sums.keep(q)
            assert q.grad is None
    assert torch.equal(p.grad, q.grad)
    assert not torch.equal(p.grad, grads.float().sum(0).bfloat16())     # rounded 8 times
    q.grad = None
    sums.add(q)                                 # taken: there is no sum any more
    assert q.grad is None


# ------------------------------------------------------------------------------ copies that wait

class Late:
    """A stream whose copies run when somebody waits for them and not before, as a GPU's may."""

    def __init__(self):
        self.queue, self.done = deque(), 0

    @contextmanager
    def running(self):
        with Deferred(self):
            yield

    def run(self, number):
        while self.done < number and self.queue:
            self.queue.popleft()()
            self.done += 1

    def wait_stream(self, other):
        """What computes is never late here."""

    def record_event(self):
        return Event(self, self.done + len(self.queue))

    def synchronize(self):
        self.run(self.done + len(self.queue))


class Event:
    def __init__(self, stream, number):
        self.stream, self.number = stream, number

    def synchronize(self):
        self.stream.run(self.number)


class Now:
    """The stream that computes: at once, but for the events it waits for."""

    @staticmethod
    def wait_event(event):
        event.synchronize()


class Deferred(TorchDispatchMode):
    """Inside, a copy gives memory full of ones' bits, and is made later."""

    def __init__(self, stream):
        super().__init__()
        self.stream = stream

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name == "aten::_to_copy":
            source, result = args[0], torch.empty_like(args[0])
            result.view(torch.uint8).fill_(255)
            self.stream.queue.append(lambda: result.copy_(source))
            return result
        if name == "aten::copy_":
            target, source = args[:2]
            self.stream.queue.append(lambda: target.copy_(source))
            return target
        return function(*args, **(kwargs or {}))


@pytest.fixture
def late(monkeypatch):
    """A HostMemory with a second stream that is as late as it may be, in place of the CPU's."""
    memory = HostMemory(CPU)
    memory.stream, memory.arena = Late(), Arena(1 << 16, pinned=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Now)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream.running())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None, raising=False)
    for module in (host_state, adamw, step):
        monkeypatch.setattr(module, "host_memory", lambda device: memory)
    return memory


def trained(steps=3, micro_batches=3, clip=0., wait=True, **offload):
    """A small LLaMA in bf16 after some steps of GradientStep: (weights, states by name, norms)."""
    model = shaken(llama.Llama(llama.Config(60, 32, 3, 2, 1, 48))).bfloat16()
    optimizers = [AdamW([p], 1e-2, seed=i, offload=offload.get("state", False))
                  for i, p in enumerate(model.parameters())]
    job = train.TrainJob(model, optimizers, steps, None, None, None, None, clip=clip,
                         offload_gradients=offload.get("gradients", False))
    gradients, norms = train.GradientStep(job), []
    if not wait:
        gradients.memory.wait = lambda: None
    dice = torch.Generator().manual_seed(3)
    for _ in range(steps):
        for i in range(micro_batches):
            ids = torch.randint(0, 60, (2, 9), generator=dice)
            gradients.begin(i == micro_batches - 1)
            model(ids).float().logsumexp(-1).mean().backward()
        norms.append(gradients.finish())
        gradients.step()
    states = {f"{i} {key}": x.clone() for i, (p, o) in enumerate(zip(model.parameters(),
                                                                       optimizers))
              for key, x in o.state[p].items()}
    return {n: p.detach().clone() for n, p in model.named_parameters()}, states, norms


def equal(a, b):
    return (all(torch.equal(a[0][n], b[0][n]) for n in b[0]) and a[2] == b[2]
            and all(torch.equal(a[1][n], b[1][n]) for n in b[1]))


@pytest.mark.parametrize("offload", [{"state": True}, {"gradients": True},
                                     {"state": True, "gradients": True}], ids=str)
def test_late_copies_change_no_bit(late, offload):
    for micro_batches in (1, 3):
        plain = trained(micro_batches=micro_batches)
        assert equal(trained(micro_batches=micro_batches, **offload), plain)
        assert not late.stream.queue
    if "gradients" not in offload:
        plain = trained(clip=1e-3)
        assert equal(trained(clip=1e-3, **offload), plain)


def test_a_copy_that_is_not_waited_for_is_noticed(late, monkeypatch):
    """Controls: on the way here, on the way back, and where a checkpoint reads."""
    plain, offload = trained(), {"state": True, "gradients": True}
    assert not equal(trained(wait=False, **offload), plain)
    get = Visit.get
    monkeypatch.setattr(Visit, "get", lambda self: self.here)
    assert not equal(trained(**offload), plain)
    monkeypatch.setattr(Visit, "get", get)
    send = HostMemory.send

    def send_ahead(self, here, tensors):        # the memory of what is sent is used again at once
        send(self, here, tensors)
        for x in here.values():
            x.zero_()
    monkeypatch.setattr(HostMemory, "send", send_ahead)
    assert not equal(trained(**offload), plain)


@pytest.mark.parametrize("unsent", [1, 5])
def test_the_device_holds_the_states_of_three_weights(late, monkeypatch, unsent):
    """One that comes, one at work, one that goes. Control: more unsent, and it holds more."""
    monkeypatch.setattr(host_state, "UNSENT", unsent)
    alive, held = [], []
    begin = Visit.__init__

    def counted(self, memory, tensors):
        begin(self, memory, tensors)
        if "m" in self.here:
            alive.append(weakref.ref(self.here["m"]))
            held.append(sum(x() is not None for x in alive))
    monkeypatch.setattr(Visit, "__init__", counted)
    trained(state=True)
    assert (max(held) == 3) == (unsent == 1) and max(held) >= 3


# -------------------------------------------------------------------------------------- whole runs

@pytest.mark.parametrize("more", [("--stochastic",), ("--accum", 2), ("--pack", 256)],
                         ids=["stochastic", "two micro-batches", "packed"])
def test_a_run_ends_with_the_same_bits(flags, run, tmp_path, more):             # noqa: F811
    """Also one that was stopped and goes on with one of the two flags."""
    argv = lambda name, *rest: flags(tmp_path / name, *ADAMW8, *more, *rest)
    assert run(argv("plain")).code == 0
    assert run(argv("both", *BOTH)).code == 0
    assert run(argv("cut", *BOTH), signal=(2, signal.SIGTERM)).code == 143
    assert run(argv("cut", BOTH[0], "--resume", "auto")).code == 0
    assert sha(tmp_path / "both") == sha(tmp_path / "cut") == sha(tmp_path / "plain")
    a, b, c = ([load_file(tmp_path / f"{name}/step-000006/optimizer.safetensors"),
                [x["grad_norm"] for x in lines(tmp_path / name / "metrics.jsonl")]]
               for name in ("plain", "both", "cut"))
    for other in (b, c):
        assert a[1] == other[1] and a[0].keys() == other[0].keys()
        assert all(torch.equal(a[0][k], other[0][k]) for k in a[0])
    assert any(k.endswith("|m") and x.any() for k, x in a[0].items())


def test_a_resident_checkpoint_goes_on_on_the_host_and_back(flags, run, tmp_path):  # noqa: F811
    assert run(flags(tmp_path / "plain", *ADAMW8)).code == 0
    for first, then in (((), BOTH), (BOTH, ())):
        out = tmp_path / str(len(first))
        assert run(flags(out, *ADAMW8, *first), signal=(3, signal.SIGTERM)).code == 143
        assert run(flags(out, *ADAMW8, *then, "--resume", "auto")).code == 0
        assert sha(out) == sha(tmp_path / "plain")


def test_a_step_at_the_end_may_have_its_states_on_the_host(flags, run, tmp_path):   # noqa: F811
    for name, more in (("plain", ()), ("host", BOTH[:1])):
        assert run(flags(tmp_path / name, *ADAMW8, "--clip", 1, *more)).code == 0
    assert sha(tmp_path / "host") == sha(tmp_path / "plain")


@pytest.mark.parametrize("trains", ["projector", "projector,llm"])
def test_sums_of_what_the_last_micro_batch_did_not_touch(flags, run, album, tmp_path,  # noqa: F811
                                                          trains):
    """Text alone touches no projector: its sum comes back all the same, and is stepped."""
    def rows(album):
        album[:] = [album[0], album[3], album[3], album[1], album[3], album[3]]
    argv = lambda name, *more: flags(tmp_path / name, *ADAMW8, *album(rows), "--train", trains,
                                     "--batch", 2, "--accum", 2, *more, steps=4)
    assert run(argv("plain")).code == 0 and run(argv("host", *BOTH)).code == 0
    assert sha(tmp_path / "plain") == sha(tmp_path / "host")


def test_a_fault_on_the_way_is_seen_by_these_tests(flags, tmp_path, monkeypatch):   # noqa: F811
    """Control: a sum that is lost, in a run of two micro-batches a step."""
    args = lambda name, *more: flags(tmp_path / name, *ADAMW8, "--accum", 2, *more)
    assert here(args("plain")) == here(args("host", *BOTH)) == 0
    monkeypatch.setattr(HostSums, "add", lambda self, weight: self.begun.discard(id(weight)))
    assert here(args("lost", *BOTH)) == 0
    assert sha(tmp_path / "host") == sha(tmp_path / "plain") != sha(tmp_path / "lost")


def test_nothing_of_a_step_stays_on_the_device(flags, tmp_path):                # noqa: F811
    """After each micro-batch no gradient is left but the one that waits; states are the host's."""
    args = parse(flags(tmp_path, *ADAMW8, "--accum", 2, "--warmup", 0, *BOTH, steps=1))
    job, alive = train.vlm_job(args, tmp_path, "cpu"), []
    weights = list(job.trained().values())
    for p in weights:
        p.register_post_accumulate_grad_hook(lambda p: alive.append(
            sum(q.grad is not None for q in weights)))
    (tmp_path / "out").mkdir()
    assert train.train_loop(job, Run(tmp_path / "out", args)) == 0
    assert len(alive) > 2 * 10 and max(alive) <= 2
    assert host_memory(CPU).device == CPU


def test_nan_stops_a_run_that_waits_on_the_host(flags, run, tmp_path):          # noqa: F811
    out = tmp_path / "run"
    done = run(flags(out, *ADAMW8, "--accum", 2, *BOTH), nan_gradient=3)
    assert done.code == 1 and "step 3" in done.err
    assert [p.name for p in out.glob("step-*")] == ["step-000002"]
    assert run(flags(out, *ADAMW8, "--accum", 2, *BOTH, "--resume", "auto")).code == 0


@pytest.mark.parametrize("argv, words", [
    (["--stage", "2", BOTH[0]], "adamw8"), (["--stage", "2", BOTH[1]], "adamw8"),
    (["--stage", "2", "--optimizer", "adamw8", "--clip", "1", BOTH[1]], "--clip 0"),
    (["--stage", "2", "--optimizer", "adamw8", BOTH[1]], "--clip 0"),       # the toy's row clips
    (["--stage", "1", "--recipe", "blip2", BOTH[0]], "LLaMA"), (["--stage", "0", BOTH[0]], "LLaMA"),
    (["--stage", "2", "--pcie", "0"], "--pcie"), (["--stage", "2", "--pcie", "nan"], "--pcie")])
def test_flags_that_do_not_go_together(argv, words, capsys):
    with pytest.raises(SystemExit) as left:
        parse(argv)
    assert left.value.code == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
