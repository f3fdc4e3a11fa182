"""Generated tokens: greedy and sampled, batched and alone, with and without what cuts the distribution."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer

from attention.oracle import VARIANTS
from mhe_lightning.attention import MHE
from mhe_lightning.data.tokenizer import BPE_END_OF_TEXT, train_tokenizer
from mhe_lightning.models import Decoder, generate
from mhe_lightning.models.generation import generate_text, stream, stream_text

VOCABULARY, LENGTH = 23, 24
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5], [3, 5, 8, 9, 7, 9, 3]]
LOGITS = torch.tensor([2.0, 0.0, 3.0, 1.0, -1.0])


@pytest.fixture(scope="module")
def net() -> Decoder:
    """A random decoder whose next token depends strongly on what was before."""
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, MHE, width=16, n_heads=4, n_layers=2, max_length=LENGTH, tie_embeddings=False)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.7)
    return net.double().eval()


def constant(logits: torch.Tensor) -> Decoder:
    """A real decoder that gives the same ``logits`` at every position, whatever it reads."""
    net = Decoder(len(logits), MHE, width=4, n_heads=2, n_layers=1, max_length=400, tie_embeddings=False).eval()
    with torch.no_grad():
        net.norm.weight.zero_()
        net.norm.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # the hidden state of every token
        net.head.weight.zero_()
        net.head.weight[:, 0] = logits
    return net


def drawn(n: int = 300, logits: torch.Tensor = LOGITS, **settings) -> Counter:
    """How often each token is drawn among ``n``."""
    (tokens,) = generate(constant(logits), [[0]], max_new_tokens=n, **settings)
    assert len(tokens) == n
    return Counter(tokens)


def literal_greedy(net: Decoder, prompt: list[int], n: int) -> list[int]:
    """Token by token over the whole sequence, without a cache."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(int(net.logits(net(torch.tensor([tokens])))[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_takes_the_most_likely_token_at_each_step(net):
    expected = [literal_greedy(net, prompt, 12) for prompt in PROMPTS]
    assert len({tuple(tokens) for tokens in expected}) > 1  # the prompts matter
    for prompt, tokens in zip(PROMPTS, expected, strict=True):
        assert generate(net, [prompt], max_new_tokens=12, temperature=0) == [tokens]
    assert generate(net, PROMPTS, max_new_tokens=12, temperature=0) == expected


@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"temperature": 1.5, "top_k": 8, "top_p": 0.9}], ids=str)
def test_a_batch_gives_what_each_prompt_gives_alone(net, settings):
    together = generate(net, PROMPTS, max_new_tokens=12, seed=4, **settings)
    alone = [
        generate(net, [prompt], max_new_tokens=12, seed=4, first=number, **settings)[0]
        for number, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    halves = [
        *generate(net, PROMPTS[:2], max_new_tokens=12, seed=4, **settings),
        *generate(net, PROMPTS[2:], max_new_tokens=12, seed=4, first=2, **settings),
    ]
    assert together == halves


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_on_the_left_changes_no_token_of_any_attention(name):
    torch.manual_seed(0)
    net = Decoder(VOCABULARY, VARIANTS[name].build, width=16, n_heads=4, n_layers=2, max_length=LENGTH)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.7)
    net.double().eval()
    together = generate(net, PROMPTS, max_new_tokens=12, temperature=0)
    assert together == [literal_greedy(net, prompt, 12) for prompt in PROMPTS]


def test_prompts_as_long_as_each_other_need_no_padding(net):
    prompts = [[3, 1, 4], [1, 5, 9]]
    expected = [literal_greedy(net, prompt, 8) for prompt in prompts]
    assert generate(net, prompts, max_new_tokens=8, temperature=0) == expected


def test_equal_seeds_draw_equal_tokens(net):
    first, again, other = (generate(net, PROMPTS, max_new_tokens=12, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_global_random_state_is_neither_used_nor_moved(net):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = generate(net, PROMPTS, max_new_tokens=6)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert generate(net, PROMPTS, max_new_tokens=6) == first


def test_equal_prompts_draw_different_tokens(net):
    first, second = generate(net, [[1, 2], [1, 2]], max_new_tokens=12, temperature=2.0)
    assert first != second


# What the distribution is cut to. The decoder below gives the probabilities softmax(LOGITS):
# token 2: 0.636, token 0: 0.234 (together 0.871), token 3: 0.086, token 1: 0.032, token 4: 0.012


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_tokens_are_drawn_with_the_softmax_of_the_divided_logits(temperature):
    n = 2000
    counts = Counter()
    for seed in range(n // 250):
        counts += drawn(250, temperature=temperature, seed=seed)
    for token, p in enumerate((LOGITS / temperature).softmax(-1).tolist()):
        assert abs(counts[token] / n - p) < 5 * (p * (1 - p) / n) ** 0.5


def test_a_low_temperature_is_greedy():
    assert drawn(50, temperature=1e-3) == drawn(50, temperature=0) == {2: 50}


@pytest.mark.parametrize(("top_k", "left"), [(1, {2}), (2, {2, 0}), (3, {2, 0, 3}), (99, {0, 1, 2, 3, 4})])
def test_top_k_leaves_the_k_most_likely_tokens(top_k, left):
    assert set(drawn(top_k=top_k)) == left


@pytest.mark.parametrize(
    ("top_p", "left"),
    [(0.01, {2}), (0.63, {2}), (0.64, {2, 0}), (0.88, {2, 0, 3}), (0.97, {2, 0, 3, 1}), (1.0, {0, 1, 2, 3, 4})],
)
def test_top_p_leaves_the_fewest_tokens_that_sum_to_p(top_p, left):
    assert set(drawn(top_p=top_p)) == left


def test_top_p_counts_among_what_top_k_and_temperature_leave():
    # of the two most likely, token 2 has 0.731, so 0.72 is reached by it alone; without top_k it is not
    assert set(drawn(top_k=2, top_p=0.72)) == {2}
    assert set(drawn(top_p=0.72)) == {2, 0}
    assert set(drawn(temperature=0.5, top_p=0.72)) == {2}  # there it has 0.865


def test_top_k_leaves_k_of_equally_likely_tokens():
    logits = torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert len(drawn(logits=logits, top_k=2)) == 2
    assert drawn(20, logits=logits, temperature=0) == {0: 20}


# The end of a text


def test_a_prompt_ends_at_the_stop_token_and_the_others_go_on(net):
    whole = generate(net, PROMPTS, max_new_tokens=12, temperature=0)
    stop = whole[0][4]
    stopped = generate(net, PROMPTS, max_new_tokens=12, temperature=0, stop_token=stop)
    assert stopped == [tokens[: tokens.index(stop)] if stop in tokens else tokens for tokens in whole]
    assert len(stopped[0]) < 12


def test_generation_ends_when_all_prompts_have_ended():
    net = constant(LOGITS)
    calls = []
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    assert generate(net, [[0], [1]], max_new_tokens=100, temperature=0, stop_token=2) == [[], []]
    assert len(calls) == 1


def test_all_positions_of_the_model_can_be_used(net):
    (tokens,) = generate(net, [[1, 2, 3]], max_new_tokens=LENGTH - 3, temperature=0)
    assert tokens == literal_greedy(net, [1, 2, 3], LENGTH - 3)


@pytest.mark.parametrize(
    ("prompts", "settings", "named"),
    [
        ([], {}, "empty"),
        ([[1], []], {}, "empty"),
        ([[1]], {"max_new_tokens": 0}, r"max_new_tokens \(0\)"),
        ([[1]], {"temperature": -1.0}, r"temperature \(-1.0\)"),
        ([[1]], {"top_k": 0}, r"top_k \(0\)"),
        ([[1]], {"top_p": 0.0}, r"top_p \(0.0\)"),
        ([[1]], {"top_p": 1.1}, r"top_p \(1.1\)"),
        ([[1], [1] * 20], {}, rf"20 tokens and 5 new .* {LENGTH} positions; ask for at most 4 "),
        ([[1] * 30], {}, "at most 0 new tokens"),
    ],
)
def test_what_cannot_be_continued_is_refused(net, prompts, settings, named):
    with pytest.raises(ValueError, match=named):
        generate(net, prompts, **{"max_new_tokens": 5, **settings})


# Step by step


def test_a_stream_gives_the_tokens_of_generate_step_by_step(net):
    whole = generate(net, PROMPTS, max_new_tokens=12, seed=3)
    steps = list(stream(net, PROMPTS, max_new_tokens=12, seed=3))
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == whole


def test_a_token_is_given_before_the_next_is_computed(net):
    calls = []
    hook = net.register_forward_pre_hook(lambda *_: calls.append(1))
    given = stream(net, PROMPTS, max_new_tokens=12)
    for n in range(1, 4):
        next(given)
        assert len(calls) == n
    hook.remove()


def test_a_finished_prompt_gives_none_while_others_go_on(net):
    whole = generate(net, PROMPTS, max_new_tokens=12, temperature=0)
    stop = whole[0][4]
    lengths = [tokens.index(stop) if stop in tokens else 12 for tokens in whole]
    steps = list(stream(net, PROMPTS, max_new_tokens=12, temperature=0, stop_token=stop))
    assert len(steps) == max(lengths)
    assert [[tokens is not None for tokens in row] for row in zip(*steps, strict=True)] == [
        [step < n for step in range(len(steps))] for n in lengths
    ]


def test_between_two_steps_gradients_are_as_they_were(net):
    for _ in stream(net, PROMPTS, max_new_tokens=2):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


# Texts


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram"])
def writer(request) -> tuple[Decoder, Tokenizer, int]:
    """A random decoder of words, its tokenizer, and the token that ends its texts."""
    tokenizer = train_tokenizer(["the cat sat on the mat, naïve café 日本, isn't it?"] * 20, request.param, 330)
    torch.manual_seed(1)
    net = Decoder(tokenizer.get_vocab_size(), MHE, width=16, n_heads=4, n_layers=1, max_length=64)
    end = {"bpe": BPE_END_OF_TEXT, "wordpiece": "[SEP]", "unigram": "</s>"}[request.param]
    return net.double().eval(), tokenizer, tokenizer.token_to_id(end)


def test_streamed_texts_are_the_decoded_tokens_after_each_prompt(writer):
    net, tokenizer, end = writer
    prompts = ["the cat", "it", ""]
    settings = {"max_new_tokens": 40, "temperature": 2.0, "seed": 1}
    ids = [[end, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in prompts]
    expected = [
        tokenizer.decode(before + new)[len(tokenizer.decode(before)) :]
        for before, new in zip(ids, generate(net, ids, stop_token=end, **settings), strict=True)
    ]
    pieces = list(stream_text(*writer, prompts, **settings))
    assert ["".join(parts) for parts in zip(*pieces, strict=True)] == expected
    assert generate_text(*writer, prompts, **settings) == expected
    assert any(len(text) > 20 for text in expected)


def test_texts_end_before_a_stop_and_computing_with_the_last(writer):
    settings = {"max_new_tokens": 40, "temperature": 2.0, "seed": 1}
    calls = []
    hook = writer[0].register_forward_pre_hook(lambda *_: calls.append(1))
    whole = generate_text(*writer, ["the cat", "it"], **settings)
    without = len(calls)
    stop = [text[5:7] for text in whole]
    texts = generate_text(*writer, ["the cat", "it"], stop=stop, **settings)
    hook.remove()
    assert texts == [text[: min(text.find(s) for s in stop if s in text)] for text in whole]
    assert len(calls) - without < without
