"""Runs: two networks over the same images, stop by stop."""

import pytest
import torch

from nm_lightning.compression.graph import graph_of
from nm_lightning.compression.statistics.runs import MEMORY, Run
from tests.networks import Residual, images, lively

STOPS = ("stem", "blocks.0.0", "blocks.0.3", "blocks.1.3", "head")
FEW = 3 << 15  # bytes: enough for one or two of the three batches inside a block, for all where little is alive


@pytest.mark.parametrize(("memory", "kept"), [(0, {0}), (FEW, {1, 2, 3}), (MEMORY, {3})])
@torch.no_grad()
def test_a_run_has_the_same_values_whatever_its_memory_keeps(memory, kept):
    model, batches = lively(Residual()), images(24).split(8)
    nodes = list(graph_of(model, batches[0]).nodes)
    run = Run(model, nodes[0].graph, batches, memory)
    counts = set()
    for stop in (node for node in nodes if node.target in STOPS):
        ahead = next(iter(stop.users))
        for batch, env in zip(batches, run.states(stop), strict=True):
            fresh = Run(model, nodes[0].graph, [batch])
            wanted = next(fresh.states(stop))
            assert env.keys() == wanted.keys()
            assert all(torch.equal(env[node], value) for node, value in wanted.items())
            assert torch.equal(run.value(ahead), fresh.value(ahead))
        counts.add(len(run.kept))
    assert counts == kept
