"""Decoding with a KV cache equals one forward pass, stores what it promises, and fails clearly."""

import pytest
import torch

from attention.oracle import assert_near, build
from mhe_lightning.attention import MHA, KVCache
from mhe_lightning.attention.cache import StaticKVCache

T = 11


def left_padding(lengths):
    """(B, 1, 1, T), True from where each row's real tokens begin."""
    return (torch.arange(T) >= T - torch.tensor(lengths)[:, None])[:, None, None, :]


def random_chunks(seed):
    torch.manual_seed(seed)
    chunks = []
    while sum(chunks) < T:
        chunks.append(min(int(torch.randint(1, 5, ())), T - sum(chunks)))
    return chunks


def decode(m, x, chunks, cache, mask=None, is_causal=True):
    """The outputs of feeding ``x`` chunk by chunk, each with its rows and columns of the full mask."""
    outputs, start = [], cache.length
    for length in chunks:
        end = start + length
        rows = slice(start, end) if mask is not None and mask.shape[2] > 1 else slice(None)
        part = None if mask is None else mask[:, :, rows, :end]
        outputs.append(m(x[:, start:end], mask=part, is_causal=is_causal, cache=cache))
        start = end
    return torch.cat(outputs, dim=1)


@pytest.fixture
def module(variant):
    with torch.no_grad():
        yield build(variant).eval()


@pytest.fixture
def x():
    return torch.randn(3, T, 12, dtype=torch.float64)


MASKS = {
    "no mask": lambda: None,
    "left padding": lambda: left_padding([11, 4, 8]),
    "per head": lambda: torch.rand(3, 4, T, T) < 0.7,
}
CHUNKS = {
    "token by token": lambda: [1] * T,
    "at once": lambda: [T],
    "prompt then tokens": lambda: [5] + [1] * (T - 5),
    "random": lambda: random_chunks(1),
    "random again": lambda: random_chunks(2),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_cached_decoding_equals_the_full_forward(module, x, chunks, mask):
    mask = mask()
    assert_near(decode(module, x, chunks(), KVCache(T), mask), module(x, mask=mask, is_causal=True))


def test_cached_single_tokens_are_causal_without_the_flag(module, x):
    assert_near(decode(module, x, [1] * T, KVCache(T), is_causal=False), module(x, is_causal=True))


def test_a_longer_cache_than_needed_changes_nothing(module, x):
    assert torch.equal(decode(module, x, [4, 1, 6], KVCache(T)), decode(module, x, [4, 1, 6], KVCache(50)))


def test_cached_chunk_does_not_see_its_own_later_tokens(module, x):
    changed = x.clone()
    changed[:, 8:] *= 1e9
    y, z = (decode(module, t, [3, 8], KVCache(T)) for t in (x, changed))
    assert torch.equal(y[:, :8], z[:, :8])


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "padding"])
def test_cross_attention_with_a_cache_equals_the_full_forward(module, x, masked):
    context = torch.randn(3, 7, 12, dtype=torch.float64)
    mask = (torch.arange(7) < torch.tensor([[7], [2], [4]]))[:, None, None, :] if masked else None
    cache = KVCache(7)
    y = [module(x[:, t : t + 1], context, mask=mask, cache=cache) for t in range(T)]
    assert_near(torch.cat(y, dim=1), module(x, context, mask=mask))


def test_cross_attention_computes_keys_and_values_once(module, x):
    context, calls, key_value = torch.randn(3, 7, 12, dtype=torch.float64), [], module.key_value
    module.key_value = lambda c: calls.append(c) or key_value(c)
    cache = KVCache(9)
    for t in range(4):
        module(x[:, t : t + 1], context, cache=cache)
    assert len(calls) == 1
    assert cache.length == 7


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("last", [1, 3, 5])
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_the_last_positions_alone_are_as_among_all_and_all_are_stored(module, x, mask, last, static):
    mask = mask()
    expected = module(x, mask=mask, is_causal=True)
    if mask is not None and static:
        mask = torch.cat([mask, torch.ones(*mask.shape[:3], 3, dtype=torch.bool)], dim=3)
    seen = [None if mask is None else mask[:, :, rows] for rows in (slice(0, 6), slice(6, T))]
    seen = [m if m is None or m.shape[2] else mask for m in seen]  # one row for all
    cache = static_cache() if static else KVCache(T)
    for chunk, part in zip((x[:, :6], x[:, 6:]), seen, strict=True):
        keys = slice(None) if static else slice(0, cache.length + chunk.shape[1])
        found = module(chunk, mask=None if part is None else part[..., keys], is_causal=True, cache=cache, last=last)
        if static:
            cache.position.add_(chunk.shape[1])
        assert_near(found, expected[:, cache.length - last : cache.length], 1e-12)
    assert cache.length == T


def test_the_last_positions_alone_need_no_cache(module, x):
    context = torch.randn(3, 7, 12, dtype=torch.float64)
    assert_near(module(x, is_causal=True, last=2), module(x, is_causal=True)[:, -2:])
    assert_near(module(x, context, last=2), module(x, context)[:, -2:])


@pytest.mark.parametrize("last", [0, T + 1])
def test_more_or_fewer_last_positions_than_there_are_are_refused(module, x, last):
    with pytest.raises(ValueError, match=rf"last \({last}\) must be from 1 to the {T} positions"):
        module(x, last=last)


def test_self_attention_computes_keys_and_values_of_new_tokens_only(module, x):
    lengths, project = [], module._project
    module._project = lambda x, c: lengths.append(c.shape[1]) or project(x, c)
    decode(module, x, [4, 1, 6], KVCache(T))
    assert lengths == [4, 1, 6]


@pytest.mark.parametrize(("n", "d"), [(4, 3), (6, 5), (2, 8)])
def test_cache_holds_exactly_the_stated_numbers_per_token(variant, n, d):
    cache = KVCache(10)
    with torch.no_grad():
        build(variant, n, d)(torch.randn(3, 4, n * d, dtype=torch.float64), cache=cache)
    assert cache.elements_per_token == variant.cached(n, d)
    assert cache.nbytes == 3 * 10 * variant.cached(n, d) * 8
    assert sum(t.numel() for t in cache.stored()) == 3 * 4 * variant.cached(n, d)


def test_cache_neither_reallocates_nor_changes_what_it_holds(module, x):
    cache = KVCache(T)
    decode(module, x, [4], cache)
    before = [(t.data_ptr(), t.clone()) for t in cache.stored()]
    decode(module, x, [1, 6], cache)
    for (pointer, old), new in zip(before, cache.stored(), strict=True):
        assert new.data_ptr() == pointer
        assert torch.equal(new[:, :, :4], old)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 1], [0, 0, 2, 2, 1], [1]], ids=str)
def test_reorder_goes_on_with_the_chosen_rows(module, x, rows):
    rows, cache = torch.tensor(rows), KVCache(T)
    decode(module, x, [5, 1], cache)
    cache.reorder(rows)
    chosen = torch.cat([x[rows, :6], torch.randn(len(rows), T - 6, 12, dtype=torch.float64)], dim=1)
    assert_near(decode(module, chosen, [1] * (T - 6), cache), module(chosen, is_causal=True)[:, 6:])


def test_reorder_leaves_what_is_shared_where_it_is(module, x):
    x = torch.cat([x[:1, :4].expand(3, -1, -1), x[:, 4:]], dim=1)  # all rows begin alike
    rows, cache, whole = torch.tensor([2, 0, 0]), KVCache(T), KVCache(T)
    for c in (cache, whole):
        decode(module, x, [5, 1], c)
    for buffer in cache._buffers:
        buffer[1, :, :4] = 1e9  # would be lost if it were written over
    cache.reorder(rows, shared=4)
    whole.reorder(rows)
    for shared, copied in zip(cache.stored(), whole.stored(), strict=True):
        assert bool((shared[1, :, :4] == 1e9).all())
        assert_near(shared[[0, 2]], copied[[0, 2]], 1e-12)
        assert torch.equal(shared[:, :, 4:], copied[:, :, 4:])


@pytest.mark.parametrize(
    ("rows", "shared", "named"),
    [([1, 0, 2], 7, r"shared \(7\) must be from 0 to the 6 tokens"), ([1, 0], 2, "must be 0 where 3 rows become 2")],
)
def test_what_cannot_be_shared_is_refused(module, x, rows, shared, named):
    cache = KVCache(T)
    decode(module, x, [6], cache)
    with pytest.raises(ValueError, match=named):
        cache.reorder(torch.tensor(rows), shared=shared)


def test_reorder_of_a_cross_attention_cache_follows_the_context(module, x):
    context, rows, cache = torch.randn(3, 7, 12, dtype=torch.float64), torch.tensor([2, 2, 0]), KVCache(7)
    module(x[:, :1], context, cache=cache)
    cache.reorder(rows)
    assert_near(module(x[:, 1:2], context[rows], cache=cache), module(x[:, 1:2], context[rows]))


def test_reorder_of_an_empty_cache_is_harmless(module, x):
    cache = KVCache(T)
    cache.reorder(torch.tensor([1, 0, 2]))
    assert_near(decode(module, x, [T], cache), module(x, is_causal=True))


def test_overflow_is_refused_and_leaves_the_cache_usable(module, x):
    cache = KVCache(8)
    y = decode(module, x, [6], cache)
    with pytest.raises(ValueError, match=r"holds 6 of at most 8 tokens and cannot take 3 more; .*max_length"):
        module(x[:, 6:9], is_causal=True, cache=cache)
    assert cache.length == 6
    y = torch.cat([y, decode(module, x, [2], cache)], dim=1)
    assert_near(y, module(x[:, :8], is_causal=True))


def test_a_context_longer_than_the_cache_is_refused(module, x):
    with pytest.raises(ValueError, match=r"at most 6 tokens and cannot take 11 more"):
        module(x, x, cache=KVCache(6))


def test_a_context_of_another_length_than_the_cached_one_is_refused(module, x):
    cache = KVCache(T)
    module(x, x, cache=cache)
    with pytest.raises(ValueError, match=r"holds 11 keys but the context has 5; use a new KVCache"):
        module(x, x[:, :5], cache=cache)


@pytest.mark.parametrize("rows", [1, 2], ids=lambda r: f"{r} rows")
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_another_batch_size_than_the_cached_one_is_refused(module, x, cross, rows):
    cache = KVCache(2 * T)
    module(x, x if cross else None, cache=cache)
    with pytest.raises(ValueError, match=r"batch"):
        module(x[:rows], x[:rows] if cross else None, cache=cache)


def test_a_refused_mask_leaves_the_cache_as_it_was(module, x):
    cache = KVCache(T)
    decode(module, x, [4], cache)
    with pytest.raises(ValueError, match="mask has shape"):
        module(x[:, 4:5], mask=torch.ones(3, 1, 1, 4, dtype=torch.bool), cache=cache)
    assert cache.length == 4


@pytest.mark.parametrize("max_length", [0, -3])
def test_a_cache_for_no_token_is_refused(max_length):
    with pytest.raises(ValueError, match=rf"max_length \({max_length}\) must be at least 1"):
        KVCache(max_length)


def test_cache_takes_the_dtype_of_the_keys():
    cache, m = KVCache(4), MHA(width=12, n_heads=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        m(torch.randn(2, 3, 12), cache=cache)
    assert {t.dtype for t in cache.stored()} == {torch.bfloat16}


# Fixed shapes


def static_cache(max_length=T + 3):
    return StaticKVCache(max_length, torch.zeros((), dtype=torch.int64))


def decode_static(m, x, chunks, cache, mask=None):
    """As `decode`, but each chunk has all columns of the mask, those of tokens that never come included."""
    outputs, start = [], cache.length
    for length in chunks:
        part = None
        if mask is not None:
            rows = slice(start, start + length) if mask.shape[2] > 1 else slice(None)
            unused = torch.ones(*mask.shape[:3], cache.max_length - T, dtype=torch.bool)
            part = torch.cat([mask, unused], dim=3)[:, :, rows]
        outputs.append(m(x[:, start : start + length], mask=part, is_causal=True, cache=cache))
        cache.position.add_(length)
        start += length
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS.keys())
def test_static_decoding_equals_the_full_forward(module, x, chunks, mask):
    mask = mask()
    assert_near(
        decode_static(module, x, chunks(), static_cache(), mask), module(x, mask=mask, is_causal=True), tolerance=1e-12
    )


def test_a_mask_of_what_is_visible_stands_for_causality(module, x):
    cache = static_cache()
    for start, length in ((0, 4), (4, 1), (5, 6)):
        y = module(x[:, start : start + length], mask=cache.visible(length), cache=cache)
        assert_near(y, module(x, is_causal=True)[:, start : start + length])
        cache.position.add_(length)


def test_what_a_static_cache_has_not_been_given_is_never_seen(module, x):
    cache, other = static_cache(), static_cache()
    for c in (cache, other):
        decode_static(module, x, [4], c)
    for buffer in other._buffers:
        buffer[:, :, 4:] = 1e9
    assert torch.equal(decode_static(module, x, [1, 3, 3], cache), decode_static(module, x, [1, 3, 3], other))


def test_a_static_cache_gives_its_whole_buffers_from_the_first_call(module, x):
    cache = static_cache(20)
    for length in (4, 1):
        key_values = module.key_value(x[:, :length])
        assert [t.shape[2] for t in cache.append(*key_values)] == [20] * len(key_values)
        cache.position.add_(length)
    assert cache.length == 5
    assert [t.shape[2] for t in cache.stored()] == [5] * len(key_values)


@pytest.mark.parametrize("rows", [[2, 0, 1], [0, 0, 2, 2, 1], [1]], ids=str)
def test_reorder_of_a_static_cache_goes_on_with_the_chosen_rows(module, x, rows):
    rows, cache = torch.tensor(rows), static_cache()
    decode_static(module, x, [5, 1], cache)
    cache.reorder(rows)
    chosen = torch.cat([x[rows, :6], torch.randn(len(rows), T - 6, 12, dtype=torch.float64)], dim=1)
    assert_near(decode_static(module, chosen, [1] * (T - 6), cache), module(chosen, is_causal=True)[:, 6:])


def test_a_static_cache_set_back_to_a_length_goes_on_from_there(module, x):
    cache = static_cache()
    decode_static(module, x, [9], cache)
    cache.length = 4
    assert_near(decode_static(module, x, [1] * (T - 4), cache), module(x, is_causal=True)[:, 4:])


def test_a_static_cache_with_a_context_is_refused(module, x):
    with pytest.raises(ValueError, match="for self-attention but a context was given; use a KVCache"):
        module(x, x, cache=static_cache())


def test_a_static_cache_of_which_nothing_is_hidden_is_refused(module, x):
    with pytest.raises(ValueError, match=r"nothing says which keys are written; pass is_causal=True, or a mask"):
        module(x, cache=static_cache())


def test_another_batch_size_than_a_static_cache_holds_is_refused(module, x):
    cache = static_cache()
    decode_static(module, x, [4], cache)
    with pytest.raises(ValueError, match="batch of 3 but the new one has 2 rows"):
        module(x[:2, 4:5], is_causal=True, cache=cache)


@pytest.mark.parametrize("position", [torch.zeros(1, dtype=torch.int64), torch.zeros(())], ids=["shape", "dtype"])
def test_a_position_that_is_not_one_whole_number_is_refused(position):
    with pytest.raises(ValueError, match=r"position has shape .* it must be one number"):
        StaticKVCache(4, position)
