"""How different heads are: by hand, against scipy, and as measured in models of every kind."""

from __future__ import annotations

from functools import partial
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import distance

from mhe_lightning.attention import MHA, MHE, SHA
from mhe_lightning.comparison.diversity import (
    attention_maps,
    cosine_similarity,
    diversity_of_text,
    jensen_shannon,
    maps_of_text,
    measure_heads,
    token_texts,
)
from mhe_lightning.data.tokenizer import train_tokenizer
from mhe_lightning.models import Decoder, Encoder, EncoderDecoder, beam_search
from mhe_lightning.text_batches import TokenBatch, attentions_of, text_batches

TEXT = ["the cat sings under a tree", "", "a dog runs slowly over the stone", "birds sleep with light"] * 4
SIZES = dict(width=12, n_heads=3, n_layers=2, max_length=16)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def bpe():
    return train_tokenizer(TEXT, "bpe", 280)


@pytest.fixture(scope="module")
def wordpiece():
    return train_tokenizer(TEXT, "wordpiece", 160)


def net_of(kind, attention=MHA, vocab_size=300, **sizes):
    """A model whose heads are far from uniform."""
    net = kind(vocab_size=vocab_size, attention=attention, **{**SIZES, **sizes})
    with torch.no_grad():
        for module in attentions_of(net).values():
            for parameter in module.parameters():
                parameter.normal_()
    return net.eval()


def batch_for(net, rows=2, length=9):
    tokens = torch.randint(300, (rows, length))
    return TokenBatch(tokens, None, torch.randint(300, (rows, 7)) if isinstance(net, EncoderDecoder) else None)


def test_heads_on_different_keys_diverge_by_one_bit_and_have_nothing_in_common():
    maps = torch.eye(3)[:, None]  # head i attends to key i alone
    assert jensen_shannon(maps).tolist() == [1.0]
    assert cosine_similarity(maps).tolist() == [0.0]


def test_equal_heads_do_not_diverge():
    maps = torch.softmax(torch.randn(4, 5), -1).expand(6, 4, 5)
    assert jensen_shannon(maps).tolist() == pytest.approx([0.0] * 4, abs=1e-12)
    assert cosine_similarity(maps).tolist() == pytest.approx([1.0] * 4, abs=1e-12)


def test_two_heads_by_hand():
    maps = torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]])
    # H(3/4, 1/4) - (0 + 1) / 2
    assert jensen_shannon(maps).item() == pytest.approx(0.8112781244591328 - 0.5)
    assert cosine_similarity(maps).item() == pytest.approx(0.5**0.5)


def test_a_single_head_is_alike():
    maps = torch.softmax(torch.randn(2, 1, 4, 5), -1)
    assert torch.equal(jensen_shannon(maps), torch.zeros(2, 4, dtype=torch.float64))
    assert torch.equal(cosine_similarity(maps), torch.ones(2, 4, dtype=torch.float64))


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    n=st.integers(2, 6), T=st.integers(1, 4), S=st.integers(1, 7), scale=st.floats(0, 60), seed=st.integers(0, 10**6)
)
def test_measures_are_those_of_scipy_whatever_the_order_of_the_heads(n, T, S, scale, seed):
    torch.manual_seed(seed)
    maps = torch.softmax(scale * torch.randn(n, T, S, dtype=torch.float64), -1)
    found, similar = jensen_shannon(maps), cosine_similarity(maps)
    for t in range(T):
        pairs = list(combinations(maps[:, t].numpy(), 2))
        divergence = sum(distance.jensenshannon(p, q, base=2) ** 2 for p, q in pairs) / len(pairs)
        assert found[t].item() == pytest.approx(divergence, abs=1e-7)  # scipy's is a square root's square
        cosine = sum(1 - distance.cosine(p, q) for p, q in pairs) / len(pairs)
        assert similar[t].item() == pytest.approx(cosine, abs=1e-10)
    for values in (found, similar):
        assert ((values >= 0) & (values <= 1)).all()
    order = torch.randperm(n)
    torch.testing.assert_close(jensen_shannon(maps[order]), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(cosine_similarity(maps[order]), similar, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [Decoder, Encoder, EncoderDecoder])
def test_the_single_heads_of_sha_are_alike_and_those_of_mha_are_not(kind):
    places = ["encoder", "decoder", "cross"] if kind is EncoderDecoder else ["self"]
    shared, own = (net_of(kind, attention) for attention in (SHA, MHA))
    found = measure_heads(shared, [batch_for(shared)])
    assert [(entry.place, entry.layer) for entry in found] == [(place, layer) for place in places for layer in (0, 1)]
    for entry in found:
        assert entry.jensen_shannon == pytest.approx(0, abs=1e-12)
        assert entry.cosine == pytest.approx(1, abs=1e-12)
    for entry in measure_heads(own, [batch_for(own)]):
        assert 0.01 < entry.jensen_shannon <= 1
        assert 0 <= entry.cosine < 0.99


def test_embeddings_near_zero_leave_the_heads_of_mhe_alike_and_large_ones_do_not():
    found = []
    for std in (1e-3, 3.0):
        net = Decoder(vocab_size=300, attention=partial(MHE, embedding_std=std), **SIZES).eval()
        with torch.no_grad():
            for module in attentions_of(net).values():
                module.w_k.weight.normal_()
        found.append(measure_heads(net, [TokenBatch(torch.randint(300, (2, 9)))])[0])
    assert found[0].jensen_shannon < 1e-4 < 0.05 < found[1].jensen_shannon
    assert found[0].cosine > 0.999 > found[1].cosine


def test_the_first_query_of_a_causal_sequence_is_left_out():
    net = net_of(Decoder)
    batch = TokenBatch(torch.randint(300, (1, 5)))
    found = measure_heads(net, [batch])
    maps = attention_maps(net, batch, train_tokenizer(TEXT, "bpe", 280)).layers
    for entry in found:
        rows = torch.tensor(maps[entry.place, entry.layer])[:, 1:]
        assert entry.jensen_shannon == pytest.approx(jensen_shannon(rows).mean().item(), abs=1e-6)
        assert entry.cosine == pytest.approx(cosine_similarity(rows).mean().item(), abs=1e-6)


@pytest.mark.parametrize("kind", [Decoder, Encoder, EncoderDecoder])
def test_padding_counts_for_nothing(kind):
    net = net_of(kind)
    long, short = (batch_for(net, rows=1, length=length) for length in (9, 6))
    padded = batch_for(net, rows=2)
    padded.tokens[0], padded.tokens[1, :6] = long.tokens[0], short.tokens[0]
    padding = torch.arange(9) < torch.tensor([[9], [6]])
    if kind is EncoderDecoder:
        short = short._replace(target_tokens=short.target_tokens[:, :4])
        padded.target_tokens[0], padded.target_tokens[1, :4] = long.target_tokens[0], short.target_tokens[0]
        padded = padded._replace(target_padding=torch.arange(7) < torch.tensor([[7], [4]]))
    found = measure_heads(net, [padded._replace(padding=padding)])
    for entry, expected in zip(found, measure_heads(net, [long, short]), strict=True):
        assert entry.jensen_shannon == pytest.approx(expected.jensen_shannon, abs=1e-6)
        assert entry.cosine == pytest.approx(expected.cosine, abs=1e-6)


def test_a_model_is_measured_in_eval_mode_and_left_as_it_was():
    net = net_of(Decoder, dropout=0.5)
    batch = batch_for(net)
    expected = measure_heads(net, [batch])
    net.train()
    net.norm.eval()
    assert measure_heads(net, [batch]) == expected
    assert net.training
    assert net.blocks[0].training
    assert not net.norm.training
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_text_is_one_stream_in_rows_for_a_decoder(bpe):
    net = net_of(Decoder)
    batches = list(text_batches(net, bpe, TEXT, max_tokens=40, batch_size=2))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 16), (1, 8)]
    stream = torch.cat([batch.tokens.flatten() for batch in batches]).tolist()
    assert stream == bpe.encode("\n".join(TEXT)).ids[:40]


def test_rows_of_an_encoder_stand_between_its_special_tokens(wordpiece):
    net = net_of(Encoder)
    (batch,) = text_batches(net, wordpiece, TEXT, max_tokens=20)
    start, end = wordpiece.token_to_id("[CLS]"), wordpiece.token_to_id("[SEP]")
    assert batch.tokens.shape == (2, 16)
    assert batch.padding.sum(1).tolist() == [16, 8]
    assert batch.tokens[:, 0].tolist() == [start, start]
    assert [batch.tokens[0, 15].item(), batch.tokens[1, 7].item()] == [end, end]


def test_an_encoder_decoder_reads_its_own_translations(bpe):
    net = net_of(EncoderDecoder, max_length=40)
    end = bpe.token_to_id("<|endoftext|>")
    batches = list(text_batches(net, bpe, TEXT[:4], batch_size=2))
    assert [len(batch.tokens) for batch in batches] == [2, 1]
    for batch, lines in zip(batches, (TEXT[0:3:2], TEXT[3:4]), strict=True):
        found = beam_search(net, batch.tokens, batch.padding, start_token=end, end_token=end, beam_size=1)
        for row, line in enumerate(lines):
            source = batch.tokens[row] if batch.padding is None else batch.tokens[row][batch.padding[row]]
            assert source.tolist() == [*bpe.encode(line).ids, end]
            real = slice(None) if batch.target_padding is None else batch.target_padding[row]
            assert batch.target_tokens[row][real].tolist() == [end, *found[row][0].tokens]
    few = list(text_batches(net, bpe, TEXT, batch_size=2, max_tokens=2))
    assert len(few) == 1


@pytest.mark.parametrize("kind", [Decoder, Encoder, EncoderDecoder])
def test_a_text_too_short_or_a_number_out_of_range_is_refused(kind, bpe):
    net = net_of(kind)
    for lines in ([], ["", " "]):
        with pytest.raises(ValueError, match=r"the text (is empty|has 0 tokens); give"):
            diversity_of_text(net, bpe, lines)
    with pytest.raises(ValueError, match=r"max_tokens \(1\) must be at least 2"):
        diversity_of_text(net, bpe, TEXT, max_tokens=1)
    with pytest.raises(ValueError, match=r"batch_size \(0\) must be at least 1"):
        diversity_of_text(net, bpe, TEXT, batch_size=0)


def test_one_token_is_too_short_for_a_decoder(bpe):
    with pytest.raises(ValueError, match="the text has 1 tokens; give one of at least 2"):
        diversity_of_text(net_of(Decoder), bpe, ["t"])
    with pytest.raises(ValueError, match="no query of the self attention of layer 0 sees more than one key"):
        measure_heads(net_of(Decoder), [TokenBatch(torch.zeros(1, 1, dtype=torch.long))])


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="net is a Linear; it must be a Decoder"):
        measure_heads(torch.nn.Linear(2, 2), [])


def test_maps_are_of_the_first_tokens_of_each_side(bpe, wordpiece):
    decoder = net_of(Decoder, max_length=64)
    maps = maps_of_text(decoder, bpe, TEXT)
    assert len(maps.tokens) == len(maps.queries) == 24
    assert "".join(maps.tokens) == bpe.decode(bpe.encode("\n".join(TEXT)).ids[:24]).replace(" ", "␣").replace("\n", "⏎")
    assert torch.tensor(maps.layers["self", 1]).shape == (3, 24, 24)
    assert torch.tensor(maps.layers["self", 1]).sum(-1).allclose(torch.ones(3, 24))

    maps = maps_of_text(net_of(Encoder, max_length=64), wordpiece, TEXT)
    assert (maps.tokens[0], maps.tokens[-1]) == ("[CLS]", "[SEP]")
    assert len(maps.tokens) == 24

    maps = maps_of_text(net_of(EncoderDecoder, max_length=64), bpe, TEXT)
    S, T = len(maps.tokens), len(maps.queries)
    assert maps.tokens[-1] == maps.queries[0] == "<|endoftext|>"
    shapes = {place: tuple(torch.tensor(found).shape) for place, found in maps.layers.items()}
    assert shapes["encoder", 0] == (3, S, S)
    assert shapes["decoder", 0] == (3, T, T)
    assert shapes["cross", 0] == (3, T, S)


def test_maps_are_made_of_one_row(bpe):
    with pytest.raises(ValueError, match="the batch has 2 rows"):
        attention_maps(net_of(Decoder), TokenBatch(torch.zeros(2, 4, dtype=torch.long)), bpe)


def test_tokens_of_every_tokenizer_are_readable(bpe, wordpiece):
    unigram = train_tokenizer(TEXT * 5, "unigram", 320)
    assert "".join(token_texts(bpe, bpe.encode("the cat\nsings").ids)) == "the␣cat⏎sings"
    assert "".join(token_texts(unigram, unigram.encode("the cat").ids)) == "␣the␣cat"
    words = token_texts(wordpiece, [wordpiece.token_to_id("[CLS]"), *wordpiece.encode("the cat").ids])
    assert words[0] == "[CLS]"
    assert "".join(words[1:]).replace("##", "") == "thecat"
    for tokenizer in (bpe, unigram, wordpiece):
        assert token_texts(tokenizer, [10**6]) == ["1000000"]
