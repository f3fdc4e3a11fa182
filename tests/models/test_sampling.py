"""Choosing tokens for all rows at once, as on a GPU, has the distribution of choosing them one by one."""

from __future__ import annotations

import pytest
import torch

from mhe_lightning.models.sampling import Sampling

LOGITS = torch.tensor([2.0, 0.0, 3.0, 1.0, -1.0])
SETTINGS = [{}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.88}, {"top_k": 3, "top_p": 0.72, "temperature": 2.0}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_evenly_spread_numbers_give_each_token_its_probability(settings):
    n, sampling = 100_000, Sampling(**settings)
    uniform = (torch.arange(n) + 0.5) / n
    counts = sampling.choose_all(LOGITS.expand(n, -1), uniform).bincount(minlength=5)
    p, tokens = sampling._candidates(LOGITS)
    if sampling.top_p is not None:
        p = p[: int((p.cumsum(-1) < sampling.top_p).sum()) + 1]
    expected = torch.zeros(5).scatter(0, tokens[: len(p)], p / p.sum())
    assert (counts / n - expected).abs().max() <= 2 / n


@pytest.mark.parametrize("settings", SETTINGS[2:], ids=str)
def test_both_ways_cut_the_distribution_to_the_same_tokens(settings):
    sampling, n = Sampling(**settings), 500
    each = sampling.choose_each(LOGITS.expand(n, -1), [torch.Generator().manual_seed(i) for i in range(n)])
    every = sampling.choose_all(LOGITS.expand(n, -1), torch.linspace(0, 1 - 2**-24, n))
    assert set(each.tolist()) == set(every.tolist())
    assert len(set(every.tolist())) < len(LOGITS)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_ends_of_the_interval_give_the_likeliest_and_the_least_likely_token_that_is_left(settings):
    sampling = Sampling(**settings)
    lowest, highest = sampling.choose_all(LOGITS.expand(2, -1), torch.tensor([0.0, 1 - 2**-24])).tolist()
    left = set(sampling.choose_all(LOGITS.expand(500, -1), torch.linspace(0, 1 - 2**-24, 500)).tolist())
    assert lowest == 2
    assert highest == min(left, key=lambda token: LOGITS[token])


def test_rows_are_chosen_apart_from_each_other():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    uniform, sampling = torch.rand(6, generator=torch.Generator().manual_seed(1)), Sampling(top_p=0.9)
    together = sampling.choose_all(logits, uniform)
    assert together.tolist() == [int(sampling.choose_all(logits[i : i + 1], uniform[i : i + 1])) for i in range(6)]


def test_temperature_zero_takes_the_likeliest_in_both_ways():
    logits, sampling = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), Sampling(temperature=0)
    expected = logits.argmax(-1).tolist()
    assert sampling.choose_all(logits, torch.rand(6)).tolist() == expected
    assert sampling.choose_each(logits, [torch.Generator()] * 6).tolist() == expected


def test_an_end_that_rounding_reaches_is_still_a_token_that_can_be_chosen():
    logits = torch.cat([torch.zeros(3), torch.full((50_000,), -30.0)])
    assert Sampling(top_k=3).choose_all(logits[None], torch.tensor([1.0])).item() in range(3)
