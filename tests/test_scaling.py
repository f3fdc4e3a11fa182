"""How long what is sent takes, and what of it can be hidden, in cases that are easily reckoned."""

from __future__ import annotations

import pytest

from mhe_lightning.communication import Collective, Layout
from mhe_lightning.scaling import Cluster, step_time

GB = 10**9
CLUSTER = Cluster(per_node=8, node_bandwidth=100 * GB, network_bandwidth=10 * GB, node_latency=0.0, network_latency=0.0)


def of(kind="all_gather", group="shards", carries="parameters", during="forward", nbytes=GB, calls=1, micro_batches=1):
    return Collective(kind, group, carries, during, nbytes, calls, micro_batches)


@pytest.mark.parametrize(
    ("layout", "group", "gigabytes_per_second"),
    [
        pytest.param(Layout.of_shards(8), "shards", 100, id="one node"),
        pytest.param(Layout.of_shards(64), "shards", 80, id="eight adapters of each node"),
        pytest.param(Layout.of_shards(64, shard=8), "replicas", 10, id="one process of each node"),
        pytest.param(Layout.of_shards(64, shard=8), "shards", 100, id="shards in a node"),
        pytest.param(Layout.of_shards(64, tensor_parallel=2), "shards", 40, id="every second process of a node"),
        pytest.param(Layout.of_shards(64, tensor_parallel=2), "parts", 100, id="parts in a node"),
        pytest.param(Layout.of_shards(64, tensor_parallel=16), "parts", 80, id="parts of two nodes"),
        pytest.param(Layout.of_shards(64, tensor_parallel=16), "shards", 10, id="shards that are nodes apart"),
    ],
)
def test_a_group_sends_as_fast_as_its_links(layout, group, gigabytes_per_second):
    collective = of(group=group)
    expected = collective.sent(layout) / (gigabytes_per_second * GB)
    assert CLUSTER.seconds(collective, layout) == pytest.approx(expected)


def test_a_process_alone_takes_no_time():
    assert Cluster().seconds(of(group="replicas"), Layout.of_shards(8)) == 0


def test_each_call_takes_a_hop_for_every_further_process():
    slow = Cluster(per_node=8, node_latency=1.0, network_latency=10.0)
    nothing = of(nbytes=0, calls=3)
    assert slow.seconds(nothing, Layout.of_shards(8)) == 3 * 7
    assert slow.seconds(nothing, Layout.of_shards(64)) == 3 * (64 - 8 + 7 * 10)


def test_a_sum_over_many_nodes_goes_through_a_tree():
    slow = Cluster(per_node=8, node_latency=1.0, network_latency=10.0)
    nothing = of(kind="all_reduce", group="replicas", nbytes=0)
    assert slow.seconds(nothing, Layout(64)) == 2 * (7 + 3 * 10)


def times(*found, micro_batches=1, layout=None):
    """Of a step whose micro-batch computes for 1 s forward and 2 s backward."""
    sizes = dict(
        rate=1.0, forward_flops=1.0, training_flops=3.0, needed_flops=2.5, tokens=1000, micro_batches=micro_batches
    )
    return step_time(CLUSTER, layout or Layout.of_shards(8), found, **sizes)


def seconds(n: float) -> int:
    """Bytes that eight processes of a node gather in ``n`` seconds."""
    return round(n * 100 * GB * 8 / 7)


def test_what_is_sent_is_hidden_behind_its_own_pass():
    forward, backward = of(nbytes=seconds(1.5)), of(nbytes=seconds(1.5), during="backward")
    time = times(forward, backward)
    assert time.computing == 3
    assert time.sending == pytest.approx(3)
    assert time.exposed == pytest.approx(0.5)
    assert time.overlapped == pytest.approx(3.5)
    assert time.serial == pytest.approx(6)
    assert time.hidden == pytest.approx(2.5 / 3)
    assert time.efficiency == pytest.approx(2.5 / 3.5)
    assert time.serial_efficiency == pytest.approx(2.5 / 6)
    assert time.tokens_per_second == pytest.approx(8 * 1000 / 3.5)


def test_sums_of_partial_activations_are_waited_for():
    sums = of("all_reduce", "parts", "activations", nbytes=seconds(0.5))
    time = times(sums, layout=Layout.of_shards(8, tensor_parallel=8))
    assert time.waiting == pytest.approx(1)
    assert time.hidden == 0
    assert time.overlapped == time.serial == pytest.approx(4)


def test_what_is_sent_once_a_step_is_hidden_behind_one_micro_batch_only():
    gradients = dict(carries="gradients", during="backward")
    assert times(of(**gradients, nbytes=seconds(4)), micro_batches=4).exposed == pytest.approx(2)
    assert times(of(**gradients, nbytes=seconds(4), micro_batches=4), micro_batches=4).exposed == 0


def test_from_the_critical_tokens_on_everything_is_hidden():
    found = of(nbytes=seconds(1.5))
    time = times(found)
    assert time.critical_tokens == pytest.approx(1500)
    longer = step_time(
        CLUSTER,
        Layout.of_shards(8),
        [found],
        rate=1.0,
        forward_flops=1.5,
        training_flops=4.5,
        needed_flops=4.5,
        tokens=1500,
    )
    assert longer.exposed == pytest.approx(0, abs=1e-6)


def test_one_process_sends_nothing():
    time = times(layout=Layout())
    assert time.hidden is None
    assert time.critical_tokens is None
    assert time.overlapped == 3
