"""Runs: two networks over the same images, stop by stop."""

import pytest
import torch

from nm_lightning import compress
from nm_lightning.compression.graph import graph_of
from nm_lightning.compression.statistics.runs import MEMORY, Run
from tests.networks import Residual, images, lively
from tests.oracles import gap

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


class Counts(Residual):
    """Counts its images, as code does that is not meant for symbols."""

    def forward(self, x):
        return super().forward(x.view(int(x.shape[0]), *x.shape[1:]))


class Loops(Residual):
    """Takes its images one by one."""

    def forward(self, x):
        return torch.stack([super(Loops, self).forward(x[i : i + 1])[0] for i in range(len(x))])


def test_code_that_counts_its_images():
    model, plain, x = lively(Counts()), lively(Residual()), images(24)
    plain.load_state_dict(model.state_dict())
    found, wanted = (compress(each, x[:2], "reconstruct", ratio=0.5, calibration=x).model for each in (model, plain))
    assert gap(found, wanted, x) < 1e-4


def test_code_that_loops_over_its_images():
    model, x = lively(Loops()), images(24)
    report = compress(model, x[:2], "reconstruct", ratio=0.5, calibration=x).report
    assert all("used several times" in row.note for row in report.sites)


@pytest.mark.parametrize("kind", [Counts, Loops])
def test_code_that_counts_its_images_is_refitted(kind):
    model, x = lively(kind()), images(24)
    pruned, fitted = (compress(model, x[:2], "prune", ratio=0.5, calibration=x, refit=n).model for n in (0, 2))
    assert kind is Loops or gap(fitted, model, x) < 0.7 * gap(pruned, model, x)
    assert fitted(x).shape == model(x).shape
