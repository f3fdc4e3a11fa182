"""Beam search: against all sequences, against a literal search without caches, and what it stores and counts."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.oracle import VARIANTS
from mhe_lightning.attention import KVCache
from mhe_lightning.models import EncoderDecoder, Hypothesis, beam_search

VOCABULARY, WIDTH, HEADS, POSITIONS = 9, 16, 4, 32
START, END = 0, 1
TOKENS = {"start_token": START, "end_token": END}


@cache
def random_net(variant: str = "mhe_add", seed: int = 0, vocabulary: int = VOCABULARY) -> EncoderDecoder:
    """A net whose next token depends strongly on the source and on what was before, the end no less than others."""
    torch.manual_seed(seed)
    net = EncoderDecoder(
        vocabulary,
        VARIANTS[variant].build,
        width=WIDTH,
        n_heads=HEADS,
        n_layers=2,
        max_length=POSITIONS,
        tie_embeddings=False,
    )
    net = net.double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.5)
        # without what all hidden states have in common, which would make one token the best everywhere
        hidden = net(torch.randint(vocabulary, (50, 6)), torch.randint(vocabulary, (50, 9))).flatten(0, 1)
        mean, weight = hidden.mean(0), torch.randn(vocabulary, WIDTH, dtype=torch.float64)
        weight -= torch.outer(weight @ mean, mean) / mean.square().sum()
        net.head.weight.copy_(2 * weight / (hidden @ weight.T).std(0)[:, None])
    return net


def constant_net(logits: list[float]) -> EncoderDecoder:
    """A real net that gives the same ``logits`` at every position, whatever it reads."""
    net = EncoderDecoder(
        len(logits),
        VARIANTS["mhe_add"].build,
        width=4,
        n_heads=2,
        n_layers=1,
        max_length=POSITIONS,
        tie_embeddings=False,
    )
    net = net.double().eval()
    with torch.no_grad():
        net.decoder_blocks[-1].norm_2.weight.zero_()
        net.decoder_blocks[-1].norm_2.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))  # the hidden state of every token
        net.head.weight.zero_()
        net.head.weight[:, 0] = torch.tensor(logits, dtype=torch.float64)
    return net


def without_end(net: EncoderDecoder) -> EncoderDecoder:
    """``net``, which ends only where it must."""
    logits = net.logits

    def unending(hidden):
        changed = logits(hidden)
        changed[..., END] = -1e9
        return changed

    net.logits = unending
    return net


def random_sources(seed: int = 0, n: int = 6, longest: int = 7, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Token ids of ``n`` sources of different lengths, the shortest with an end token alone."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [1, longest, *torch.randint(1, longest + 1, (n - 2,), generator=draw).tolist()]
    return [torch.randint(vocabulary, (length,), generator=draw).tolist() for length in lengths]


def padded(sources: list[list[int]], columns: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and padding mask of a batch; what is padding has token ids too, which must not matter."""
    longest = max(map(len, sources)) + columns
    tokens = torch.tensor([source + [2] * (longest - len(source)) for source in sources])
    return tokens, torch.arange(longest) < torch.tensor([len(source) for source in sources])[:, None]


def search(net: EncoderDecoder, sources: list[list[int]], columns: int = 0, **options) -> list[list[Hypothesis]]:
    return beam_search(net, *padded(sources, columns), **{**TOKENS, "extra_tokens": 5, **options})


def penalty(length: int, alpha: float) -> float:
    """Eq. 14 of Wu et al. 2016."""
    return (5 + length) ** alpha / (5 + 1) ** alpha


@torch.no_grad()
def log_probabilities(net: EncoderDecoder, source: list[int], targets: list[list[int]]) -> torch.Tensor:
    """(N, T + 1, V) of the token after each prefix of targets (N, T), by teacher forcing without caches."""
    tokens = torch.tensor([[START, *target] for target in targets])
    hidden = net(torch.tensor([source] * len(targets)), tokens)
    return net.logits(hidden).log_softmax(-1)


def literal(net: EncoderDecoder, source: list[int], *, beam: int, alpha: float, extra: int) -> list[Hypothesis]:
    """The search over lists, one source at a time, from the whole prefix in each step."""
    limit = min(len(source) - 1 + extra, net.max_length - 1)
    live: list[tuple[float, list[int]]] = [(0.0, [])]
    finished: list[Hypothesis] = []
    for length in range(limit + 1):
        following = log_probabilities(net, source, [prefix for _, prefix in live])[:, -1].tolist()
        extensions = sorted(
            (-(total + log_p), number, token)
            for number, ((total, _), row) in enumerate(zip(live, following, strict=True))
            for token, log_p in enumerate(row)
            if token == END or length < limit
        )
        before, live = live, []
        for negative, number, token in extensions[: beam - len(finished)]:
            prefix = before[number][1]
            if token == END:
                finished.append(Hypothesis(prefix, -negative, -negative / penalty(length + 1, alpha)))
            else:
                live.append((-negative, [*prefix, token]))
        if not live:
            break
    return sorted(finished, key=lambda hypothesis: hypothesis.score, reverse=True)  # stable


def assert_same(actual: list[list[Hypothesis]], expected: list[list[Hypothesis]], tolerance: float = 1e-10) -> None:
    assert [[h.tokens for h in row] for row in actual] == [[h.tokens for h in row] for row in expected]
    for found, wanted in zip(itertools.chain(*actual), itertools.chain(*expected), strict=True):
        assert found.log_probability == pytest.approx(wanted.log_probability, abs=tolerance)
        assert found.score == pytest.approx(wanted.score, abs=tolerance)


def lengths_of(found: list[list[Hypothesis]]) -> set[int]:
    return {len(hypothesis.tokens) for row in found for hypothesis in row}


# What is found


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
@pytest.mark.parametrize(("vocabulary", "limit"), [(4, 3), (4, 4), (5, 3), (5, 4)])
def test_a_beam_that_prunes_nothing_finds_the_best_of_all_sequences(vocabulary, limit, alpha):
    others = [token for token in range(vocabulary) if token != END]
    for seed in range(3):
        net = random_net("mha", seed, vocabulary)
        source = random_sources(seed, 2, 3, vocabulary)[1]
        expected = []
        for length in range(limit + 1):
            targets = [list(target) for target in itertools.product(others, repeat=length)]
            log_p = log_probabilities(net, source, targets)
            for target, row in zip(targets, log_p, strict=True):
                total = sum(row[t, token].item() for t, token in enumerate([*target, END]))
                expected.append(Hypothesis(target, total, total / penalty(length + 1, alpha)))
        expected.sort(key=lambda hypothesis: -hypothesis.score)
        n = len(expected)
        assert sum(math.exp(hypothesis.log_probability) for hypothesis in expected) < 1
        options = {"beam_size": n, "length_penalty": alpha, "extra_tokens": limit - len(source) + 1}
        assert_same(search(net, [source], n_best=n, **options), [expected])
        for n_best in (1, 5):
            assert_same(search(net, [source], n_best=n_best, **options), [expected[:n_best]])


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("beam", [1, 2, 3, 4, 5])
def test_it_finds_what_a_literal_search_without_caches_finds(variant, beam):
    net, sources = random_net(variant), random_sources()
    expected = [literal(net, source, beam=beam, alpha=0.6, extra=5) for source in sources]
    found = search(net, sources, beam_size=beam, n_best=beam)
    assert_same(found, expected)
    assert len(lengths_of(found)) > 2


@pytest.mark.parametrize("alpha", [0.0, 1.0, 2.0])
def test_the_length_penalty_is_that_of_a_literal_search(alpha):
    found = []
    for seed in range(2):
        net, sources = random_net(seed=seed), random_sources(seed)
        expected = [literal(net, source, beam=4, alpha=alpha, extra=5) for source in sources]
        found += search(net, sources, length_penalty=alpha, n_best=4)
        assert_same(found[-len(sources) :], expected)
    assert all(math.isclose(h.score, h.log_probability) for row in found for h in row) == (alpha == 0)


def test_a_higher_length_penalty_favours_longer_outputs():
    mean = []
    for alpha in (0.0, 1.0, 3.0):
        best = [
            row[0] for seed in range(4) for row in search(random_net(seed=seed), random_sources(), length_penalty=alpha)
        ]
        mean.append(sum(len(hypothesis.tokens) for hypothesis in best) / len(best))
    assert mean[0] < mean[1] < mean[2]


def test_a_beam_of_one_is_greedy():
    lengths = set()
    for seed in range(3):
        net, sources = random_net(seed=seed), random_sources(seed, n=8)
        for source, (best,) in zip(sources, search(net, sources, beam_size=1), strict=True):
            tokens: list[int] = []
            total = 0.0
            while True:
                log_p = log_probabilities(net, source, [tokens])[0, -1]
                token = END if len(tokens) == len(source) - 1 + 5 else int(log_p.argmax())
                total += log_p[token].item()
                if token == END:
                    break
                tokens.append(token)
            assert best.tokens == tokens
            assert best.log_probability == pytest.approx(total, abs=1e-10)
            lengths.add(len(tokens))
    assert len(lengths) > 3


def test_a_wider_beam_finds_what_greedy_misses():
    greedy, wide = (
        [row[0].score for seed in range(4) for row in search(random_net(seed=seed), random_sources(), beam_size=beam)]
        for beam in (1, 8)
    )
    assert sum(wide) > sum(greedy)


@pytest.mark.parametrize("beam", [1, 3, 6])
@pytest.mark.parametrize("end", [0, 4, 29])
def test_equal_extensions_are_taken_in_the_order_of_hypothesis_and_token(beam, end, monkeypatch):
    monkeypatch.setitem(globals(), "END", end)  # of the literal search
    for logits in ([0.0] * 30, [float(token % 3) for token in range(30)]):
        net, sources = constant_net(logits), [[5], [3, 3, 3]]
        options = {"beam_size": beam, "n_best": beam, "end_token": end, "extra_tokens": 3}
        expected = [literal(net, source, beam=beam, alpha=0.6, extra=3) for source in sources]
        found = search(net, sources, **options)
        assert_same(found, expected)
        assert search(net, sources, **options) == found


def test_of_equal_scores_the_one_finished_earlier_is_better():
    net = constant_net([-1e4, -50.0, 0.0, -1e4])  # token 2 has log-probability 0, the end -50, to the last bit
    options = {"beam_size": 3, "length_penalty": 0.0}
    expected = [Hypothesis([2] * length, -50.0, -50.0) for length in (0, 1, 5)]  # the last place is for the longest
    assert search(net, [[3]], n_best=3, **options) == [expected]
    for early_stop in (True, False):
        assert search(net, [[3]], **options, early_stop=early_stop) == [expected[:1]]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 7),
    beam=st.integers(1, 6),
    data=st.data(),
    alpha=st.sampled_from([0.0, 0.3, 0.6, 1.0, 2.0]),
    extra=st.integers(0, 12),
)
def test_ending_early_changes_no_result(seed, beam, data, alpha, extra):
    n_best = data.draw(st.integers(1, beam))
    net, sources = random_net(seed=seed), random_sources(seed)
    options = {"beam_size": beam, "n_best": n_best, "length_penalty": alpha, "extra_tokens": extra}
    assert_same(search(net, sources, **options), search(net, sources, **options, early_stop=False), tolerance=1e-12)


@pytest.mark.parametrize("early_stop", [True, False])
def test_a_long_hypothesis_may_overtake_an_early_one(early_stop):
    # α = 2. The empty output scores ln 0.16 = -1.83. The live ones, were they to end at once, fall to -1.9 at six
    # tokens and rise afterwards: 30 tokens score -1.11. The end is too unlikely to be within the beam in between.
    net = constant_net([math.log(p) for p in (0.28, 0.16, 0.28, 0.28)])
    options = {"length_penalty": 2.0, "extra_tokens": 30, "early_stop": early_stop}
    ((best,),) = search(net, [[3]], **options)
    assert len(best.tokens) == 30
    assert best.score == pytest.approx((30 * math.log(0.28) + math.log(0.16)) / 36, abs=1e-10)


def by_step(steps: list[list[list[float]]]) -> EncoderDecoder:
    """A net whose live hypotheses have these probabilities in each step, whatever it reads."""
    net, rows = constant_net([0.0] * len(steps[0][0])), iter(steps)
    net.logits = lambda hidden: torch.tensor(next(rows), dtype=torch.float64).log()
    return net


def test_a_finished_hypothesis_takes_a_place_in_the_beam():
    # after the second step the order is 2 2, 2 end, 3 end, 3 3: the first goes on and the second ends, in two places
    net = by_step(
        [
            [[0.02, 0.06, 0.5, 0.4, 0.02]],
            [[0.02, 0.45, 0.5, 0.02, 0.01], [0.02, 0.5, 0.02, 0.42, 0.04]],
            [[0.4, 0.01, 0.3, 0.2, 0.09]],
        ]
    )
    ((*found,),) = search(net, [[3]], beam_size=2, n_best=2, length_penalty=0.0, extra_tokens=2)
    assert [hypothesis.tokens for hypothesis in found] == [[2], [2, 2]]
    assert math.exp(found[0].log_probability) == pytest.approx(0.5 * 0.45)
    assert math.exp(found[1].log_probability) == pytest.approx(0.5 * 0.5 * 0.01)


@pytest.mark.parametrize("beam", [1, 2, 3, 4, 8])
def test_unlikely_short_hypotheses_do_not_end_the_search_for_a_likely_one(beam):
    going_on, ending = [0.01, 0.02, 0.96, 0.01], [0.005, 0.99, 0.0025, 0.0025]
    net = constant_net([0.0] * 4)
    calls = iter(range(100))
    net.logits = lambda hidden: (
        torch.tensor(going_on if next(calls) < 6 else ending, dtype=torch.float64).log().expand(len(hidden), 4)
    )
    ((best,),) = search(net, [[3]], beam_size=beam, extra_tokens=20)
    assert best.tokens == [2] * 6
    assert math.exp(best.log_probability) == pytest.approx(0.96**6 * 0.99)


def test_ending_early_saves_steps(monkeypatch):
    rows = []
    net, sources = random_net("mha"), random_sources(n=12)
    decode = net.decode
    monkeypatch.setattr(net, "decode", lambda tokens, *rest: rows.append(len(tokens)) or decode(tokens, *rest))
    search(net, sources, length_penalty=0.0, extra_tokens=20)
    early = sum(rows)
    search(net, sources, length_penalty=0.0, extra_tokens=20, early_stop=False)
    assert early < 0.8 * (sum(rows) - early)


def test_hypotheses_are_distinct_and_sorted_and_the_first_do_not_depend_on_their_number():
    net, sources = random_net("gqa2"), random_sources(n=10)
    found = search(net, sources, beam_size=6, n_best=6)
    for row in found:
        assert len(row) == 6
        assert [h.score for h in row] == sorted((h.score for h in row), reverse=True)
        assert len({tuple(h.tokens) for h in row}) == 6
        assert all(END not in h.tokens for h in row)
    for n_best in (1, 2, 5):
        assert_same(search(net, sources, beam_size=6, n_best=n_best), [row[:n_best] for row in found])
    assert len({tuple(h.tokens) for row in found for h in row}) > 20  # the sources matter


def test_where_there_are_fewer_hypotheses_than_asked_for_all_are_returned():
    net = random_net("mha", vocabulary=4)
    (row,) = search(net, [[3]], beam_size=8, n_best=8, extra_tokens=0)
    assert [h.tokens for h in row] == [[]]
    (row,) = search(net, [[3]], beam_size=8, n_best=8, extra_tokens=1)
    assert sorted(h.tokens for h in row) == [[], [0], [2], [3]]


# Batches


def test_no_hypothesis_depends_on_the_batch():
    net, sources = random_net(), random_sources(n=9, longest=20)
    alone = [search(net, [source], n_best=4)[0] for source in sources]
    assert len(lengths_of(alone)) > 4
    assert_same(search(net, sources, n_best=4), alone)
    assert_same(search(net, sources[::-1], n_best=4), alone[::-1])
    assert_same(search(net, sources, columns=7, n_best=4), alone)
    for size in (2, 4):
        batches = [sources[i : i + size] for i in range(0, len(sources), size)]
        assert_same([row for batch in batches for row in search(net, batch, n_best=4)], alone)
    assert_same(search(net, [sources[3]] * 3, n_best=4), [alone[3]] * 3)


def test_without_padding_all_tokens_are_real():
    net, sources = random_net(), [source for source in random_sources(n=30) if len(source) == 3]
    assert len(sources) > 1
    tokens, padding = padded(sources)
    assert beam_search(net, tokens, **TOKENS) == beam_search(net, tokens, padding, **TOKENS)


def test_equal_calls_give_equal_results_and_leave_the_random_state():
    net, sources = random_net(), random_sources()
    state = torch.get_rng_state()
    assert search(net, sources, n_best=4) == search(net, sources, n_best=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_source_that_is_done_leaves_the_batch(monkeypatch):
    net, sources = random_net(), random_sources(n=12)
    counts = []
    decode = net.decode

    def counted(tokens, source, padding, caches):
        hidden = decode(tokens, source, padding, caches)
        assert len(tokens) % len(source) == 0
        assert {cache.own.stored()[0].shape[0] for cache in caches} == {len(tokens)}
        assert {cache.source.stored()[0].shape[0] for cache in caches} == {len(source)} == {len(padding)}
        counts.append(len(source))
        return hidden

    monkeypatch.setattr(net, "decode", counted)
    search(net, sources)
    assert counts[0] == 12
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 3


# The limit


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_each_source_has_its_own_limit_where_the_end_is_forced(extra):
    net = without_end(constant_net([0.0, 0.0, 1.0, 2.0]))
    sources = [[3] * length for length in (1, 9, 4, 2)]
    for source, row in zip(sources, search(net, sources, n_best=2, extra_tokens=extra), strict=True):
        limit = len(source) - 1 + extra
        assert {len(h.tokens) for h in row} == {limit}
        assert row[0].tokens == [3] * limit
        step = torch.tensor([0.0, -1e9, 1.0, 2.0], dtype=torch.float64).log_softmax(-1)
        assert row[0].log_probability == pytest.approx(limit * step[3].item() + step[END].item(), rel=1e-12)


def test_no_hypothesis_is_longer_than_the_positions_of_the_decoder():
    net = without_end(constant_net([0.0, 0.0, 1.0, 2.0]))
    rows = search(net, [[3] * POSITIONS, [3]], extra_tokens=POSITIONS - 3)
    assert [len(row[0].tokens) for row in rows] == [POSITIONS - 1, POSITIONS - 3]


def test_a_long_search_equals_a_literal_one():
    net, sources = random_net("mqa", 2), random_sources(n=3, longest=4)
    expected = [literal(net, source, beam=3, alpha=1.0, extra=100) for source in sources]
    found = search(net, sources, beam_size=3, n_best=3, length_penalty=1.0, extra_tokens=100)
    assert_same(found, expected)


# Precision


def test_single_precision_finds_the_same_up_to_rounding():
    net, sources = random_net("mha", 3), random_sources()
    expected = search(net, sources)
    try:
        found = search(net.float(), sources)
    finally:
        net.double()
    assert_same(found, expected, tolerance=1e-4)


def test_autocast_does_not_make_the_search_coarser():
    net, sources = random_net().float(), random_sources()
    expected = search(net, sources, n_best=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert search(net, sources, n_best=4) == expected


def test_log_probabilities_of_a_half_precision_net_are_not_rounded_to_it():
    logits = [0.0, 0.5, 1.0, 2.0]  # exact in bfloat16
    ((best,),) = search(without_end(constant_net(logits)).bfloat16(), [[3]], extra_tokens=20)
    expected = torch.tensor([0.0, -1e9, 1.0, 2.0]).bfloat16().float().log_softmax(-1)
    assert best.tokens == [3] * 20
    assert best.log_probability == pytest.approx((20 * expected[3] + expected[END]).item(), rel=1e-6)


# What is stored and computed


def test_caches_hold_a_row_per_hypothesis_of_the_target_and_a_row_per_source(monkeypatch):
    beam, limit = 4, 6
    sources = [[3] * 3, [4] * 3, [5] * 3]
    stored = {}
    for variant in VARIANTS:
        with monkeypatch.context() as patch:
            net = random_net(variant)
            made, new_caches, logits = [], net.new_caches, net.logits

            def unending(hidden, logits=logits):
                return logits(hidden).index_fill(-1, torch.tensor([END]), -1e9)

            patch.setattr(net, "logits", unending)
            patch.setattr(net, "new_caches", lambda *sizes, new=new_caches, to=made: to.append(new(*sizes)) or to[-1])
            search(net, sources, beam_size=beam, extra_tokens=limit - 2)
        ((*caches,),) = made
        numbers = VARIANTS[variant].cached(HEADS, WIDTH // HEADS)
        assert len(caches) == 2
        for layer in caches:
            assert layer.own.nbytes == len(sources) * beam * (limit + 1) * numbers * 8
            assert layer.source.nbytes == len(sources) * 3 * numbers * 8
        stored[variant] = sum(layer.own.nbytes for layer in caches)
    for variant in ("mhe_add", "mhe_multiply", "sha", "mqa"):
        assert stored["mha"] == HEADS * stored[variant]


def test_the_source_is_encoded_once_and_its_keys_and_values_are_computed_once(monkeypatch):
    net, counts = random_net("mha"), {}

    def count(module, method, name):
        call = getattr(module, method)

        def counted(*arguments, **options):
            counts[name] = counts.get(name, 0) + 1
            return call(*arguments, **options)

        monkeypatch.setattr(module, method, counted)

    count(net, "encode", "encode")
    count(net, "decode", "decode")
    for i, block in enumerate(net.decoder_blocks):
        count(block.cross_attention, "key_value", f"cross {i}")
        count(block.attention, "key_value", f"own {i}")
    search(net, random_sources())
    steps = counts["decode"]
    assert steps > 5
    assert counts == {"encode": 1, "decode": steps, "cross 0": 1, "cross 1": 1, "own 0": steps, "own 1": steps}


@pytest.mark.parametrize("variant", ["mha", "mqa"])
def test_what_hypotheses_share_is_not_moved_when_they_change_places(variant, monkeypatch):
    moved = held = 0
    reorder = KVCache.reorder

    def counted(cache, rows, shared=0):
        nonlocal moved, held
        if shared:
            for t in cache.stored():
                assert torch.allclose(t[rows, :, :shared], t[:, :, :shared], rtol=0.0, atol=1e-12)
        if cache.max_length > 20:  # the target's
            moved, held = moved + cache.length - shared, held + cache.length
        reorder(cache, rows, shared)

    monkeypatch.setattr(KVCache, "reorder", counted)
    net, sources = without_end(random_net(variant)), random_sources(n=3)
    try:
        found = search(net, sources, beam_size=3, n_best=3, extra_tokens=25)
    finally:
        del net.logits  # the net is used again
    assert max(lengths_of(found)) > 25
    assert held > 500
    assert moved < 0.6 * held


# What is refused


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"beam_size": 0}, r"beam_size \(0\) must be at least 1"),
        ({"n_best": 0}, r"n_best \(0\) must be from 1 to beam_size \(4\)"),
        ({"n_best": 5}, r"n_best \(5\) must be from 1 to beam_size \(4\); use a larger beam"),
        ({"length_penalty": -0.1}, r"length_penalty \(-0.1\) must be a number from 0"),
        ({"length_penalty": math.nan}, r"length_penalty \(nan\)"),
        ({"extra_tokens": -1}, r"extra_tokens \(-1\) must not be negative"),
        ({"start_token": -1}, r"start_token \(-1\) must be a token of the vocabulary, 0 to 8"),
        ({"end_token": VOCABULARY}, rf"end_token \({VOCABULARY}\) must be a token of the vocabulary"),
    ],
)
def test_settings_out_of_range_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        search(random_net(), [[1, 2]], **options)


@pytest.mark.parametrize(
    ("tokens", "padding", "named"),
    [
        (torch.zeros(0, 3, dtype=torch.long), None, r"tokens has shape \(0, 3\); .* at least one source"),
        (torch.zeros(3, 0, dtype=torch.long), None, r"tokens has shape \(3, 0\)"),
        (torch.tensor([1, 2]), None, r"tokens has shape \(2,\); it must be \(B, S\)"),
        (torch.tensor([[1, 2]]), torch.tensor([[True]]), r"padding has shape \(1, 1\) .* must be \(1, 2\)"),
        (torch.tensor([[1, 2]]), torch.tensor([[1, 0]]), r"dtype torch.int64; .* torch.bool with True = a real token"),
        (torch.tensor([[1, 2]] * 2), torch.tensor([[True, True], [False, True]]), "source 1 has padding before"),
        (torch.tensor([[1, 2, 3]]), torch.tensor([[True, False, True]]), "source 0 has padding before a real token"),
        (torch.tensor([[1, 2]] * 2), torch.tensor([[True, False], [False, False]]), "source 1 has no real token"),
        (torch.ones(1, POSITIONS + 1, dtype=torch.long), None, rf"{POSITIONS + 1} tokens does not fit"),
    ],
)
def test_sources_that_do_not_fit_are_refused(tokens, padding, named):
    with pytest.raises(ValueError, match=named):
        beam_search(random_net(), tokens, padding, **TOKENS)


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(ValueError, match="NaN"):
        search(constant_net([0.0, math.nan, 0.0, 0.0]), [[3]])


def test_an_end_that_is_impossible_is_refused():
    with pytest.raises(ValueError, match=r"end token \(1\) has probability 0 wherever source 0 might end"):
        search(constant_net([0.0, -math.inf, 0.0, 0.0]), [[3], [3, 3]])
