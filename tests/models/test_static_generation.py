"""Generation over KV caches of fixed shapes: the same tokens as over growing ones, and steps that can be replayed."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from attention.oracle import VARIANTS
from mhe_lightning.models import Decoder, generate, generation

every_attention = pytest.mark.parametrize("name", VARIANTS)
VOCABULARY, LENGTH = 23, 24
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3]]
SAMPLED = {"temperature": 1.5, "top_k": 8, "top_p": 0.9, "seed": 4}
READS_BACK = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


def decoder(name: str = "mhe_add") -> Decoder:
    """A random float64 decoder whose next token depends strongly on what was before."""
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, VARIANTS[name].build, width=16, n_heads=4, n_layers=2, max_length=LENGTH)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.7)
    return net.double().eval()


def padded(prompts: list[list[int]], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T) padded on the left, and which of ``length`` tokens are real (B, length)."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    starts = torch.tensor([longest - len(prompt) for prompt in prompts])
    return tokens, torch.arange(length) >= starts[:, None]


class Recorder(TorchDispatchMode):
    """The operations of a step, with their tensors, to be looked at or done again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result

    def shapes(self) -> list[tuple]:
        """Every operation with the shapes of all tensors in and out."""
        return [
            (str(operation), *(tuple(t.shape) for t in tree_leaves((args, kwargs, result)) if torch.is_tensor(t)))
            for operation, args, kwargs, result in self.done
        ]

    def replay(self) -> None:
        """All again, into the tensors that were made then: what a CUDA graph does."""
        for operation, args, kwargs, result in self.done:
            again = operation(*args, **kwargs)
            tree_map(lambda old, new: old.copy_(new) if torch.is_tensor(old) else None, result, again)


def recorded_steps(net: Decoder, static: bool, n: int = 3) -> list[Recorder]:
    tokens, padding = padded(PROMPTS, LENGTH)
    caches = net.new_caches(LENGTH, static=static)
    recorders = []
    with torch.inference_mode():
        step = generation._Step(net, padding, caches)
        step(tokens)
        for token in range(n):
            with Recorder() as recorder:
                step(torch.full((len(PROMPTS), 1), token))
            recorders.append(recorder)
    return recorders


@every_attention
@pytest.mark.parametrize("settings", [{"temperature": 0}, SAMPLED], ids=["greedy", "sampled"])
def test_fixed_shapes_give_the_tokens_of_growing_ones(name, settings):
    net = decoder(name)
    assert generate(net, PROMPTS, max_new_tokens=16, static=True, **settings) == generate(
        net, PROMPTS, max_new_tokens=16, static=False, **settings
    )


@every_attention
def test_logits_of_a_padded_batch_are_those_of_each_prompt_alone_in_either_cache(name):
    net, n = decoder(name), 6
    chosen = torch.randint(VOCABULARY, (len(PROMPTS), n), generator=torch.Generator().manual_seed(1))

    def logits(prompts, rows, static):
        tokens, padding = padded(prompts, length := max(map(len, prompts)) + n)
        step = generation._Step(net, padding, net.new_caches(length, static=static))
        return torch.stack([step(tokens), *(step(rows[:, i : i + 1]) for i in range(n))], dim=1)  # (B, n + 1, V)

    with torch.inference_mode():
        together = {static: logits(PROMPTS, chosen, static) for static in (False, True)}
        for row, prompt in enumerate(PROMPTS):
            whole = torch.tensor([prompt + chosen[row].tolist()])
            alone = net.logits(net(whole))[0, len(prompt) - 1 :]
            for found in together.values():
                assert (found[row] - alone).abs().max() <= 1e-12 * alone.abs().max()


@every_attention
def test_a_static_step_has_the_same_operations_and_shapes_each_time(name):
    first, *others = (recorder.shapes() for recorder in recorded_steps(decoder(name), static=True))
    assert all(other == first for other in others)


def test_a_step_of_growing_caches_has_not():
    first, second, _ = (recorder.shapes() for recorder in recorded_steps(decoder(), static=False))
    assert first != second


def test_a_static_step_reads_nothing_back_to_the_host():
    recorder = recorded_steps(decoder(), static=True)[0]
    assert len(recorder.done) > 50
    assert not {operation.overloadpacket.__name__ for operation, *_ in recorder.done} & READS_BACK


def test_a_static_step_is_compiled_once_and_without_a_graph_break():
    from torch._dynamo import reset
    from torch._dynamo.testing import CompileCounter

    net, counter = decoder(), CompileCounter()
    tokens, padding = padded(PROMPTS, LENGTH)
    reset()
    compiled = torch.compile(generation.next_logits, backend=counter, fullgraph=True, dynamic=False)
    caches = {call: net.new_caches(LENGTH, static=True) for call in (compiled, generation.next_logits)}
    with torch.inference_mode():
        for held in caches.values():
            generation.next_logits(net, tokens, padding, held)
            held[0].position.add_(tokens.shape[1])
        for token in range(5):
            found, expected = (
                call(net, torch.full((len(PROMPTS), 1), token), padding, held) for call, held in caches.items()
            )
            assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()
            for held in caches.values():
                held[0].position.add_(1)
    assert counter.frame_count == 1


# What a GPU does, on a CPU: a stand-in for a CUDA graph does the recorded operations again, on the tensors of then


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    graphs = []

    class Graph(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.replays = 0
            graphs.append(self)

        def replay(self) -> None:
            self.replays += 1
            super().replay()

    @contextmanager
    def nothing(*_):
        yield

    class Stream:
        def wait_stream(self, other) -> None:
            assert isinstance(other, Stream)

    monkeypatch.setattr(generation, "_replays", lambda device: True)
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": lambda graph: graph,
        "Stream": Stream,
        "current_stream": Stream,
        "stream": nothing,
        "device": lambda device: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return graphs


@every_attention
def test_replayed_steps_give_the_tokens_of_computed_ones(name, as_on_a_gpu, monkeypatch):
    net = decoder(name)
    replayed = generate(net, PROMPTS, max_new_tokens=16, temperature=0)
    assert [graph.replays for graph in as_on_a_gpu] == [15]  # all but the prompt's
    monkeypatch.undo()
    assert replayed == generate(net, PROMPTS, max_new_tokens=16, temperature=0)


def test_sampled_tokens_on_a_gpu_depend_on_neither_the_batch_nor_the_caches(as_on_a_gpu):
    net = decoder()
    together = generate(net, PROMPTS, max_new_tokens=12, **SAMPLED)
    assert together == generate(net, PROMPTS, max_new_tokens=12, static=False, **SAMPLED)
    alone = [generate(net, [prompt], max_new_tokens=12, first=i, **SAMPLED)[0] for i, prompt in enumerate(PROMPTS)]
    assert together == alone
    assert together == [row[:12] for row in generate(net, PROMPTS, max_new_tokens=16, **SAMPLED)]
    assert together != generate(net, PROMPTS, max_new_tokens=12, **{**SAMPLED, "seed": 5})


@pytest.mark.parametrize("n", [1, generation.STEPS_AHEAD, 2 * generation.STEPS_AHEAD, 11])
def test_what_runs_ahead_of_a_stop_token_is_left_out(n, as_on_a_gpu, monkeypatch):
    net = decoder()
    stop = generate(net, PROMPTS, max_new_tokens=5, temperature=0)[0][-1]
    found = generate(net, PROMPTS, max_new_tokens=n, temperature=0, stop_token=stop)
    monkeypatch.undo()
    assert found == generate(net, PROMPTS, max_new_tokens=n, temperature=0, stop_token=stop)


def test_a_gpu_waits_for_the_tokens_once_in_several_steps(as_on_a_gpu):
    n = 2 * generation.STEPS_AHEAD
    with Recorder() as recorder:
        generate(decoder(), PROMPTS[:1], max_new_tokens=n, **SAMPLED)
    stacked = [shapes for shapes in recorder.shapes() if shapes[0] == "aten.stack.default" and shapes[-1][-1] == 1]
    assert [shapes[-1] for shapes in stacked][-2:] == [(generation.STEPS_AHEAD, 1)] * 2
