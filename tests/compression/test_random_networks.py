"""Networks drawn at random: shapes hold, pruning is masking, duplicates merge without loss, solving is not worse."""

import copy

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nm_lightning import compress, trace
from tests.networks import PIECES, Random
from tests.oracles import masked


def build(pieces, ending, seed):
    torch.manual_seed(seed)
    model = Random(pieces, ending).double().eval()  # in double, so that 1e-5 is about the surgery, not about rounding
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model, torch.randn(3, 3, 6, 6).double()


def duplicate(model, site):
    """Make the second half of a site's neurons half-sized copies of the first, which get weights of one norm."""
    producer = model.get_submodule(site.name)
    norm = next((consumer.norm for consumer in site.consumers if consumer.norm), None)
    half = site.width // 2
    rows = (
        producer.weight.data if not isinstance(producer, nn.ConvTranspose2d) else producer.weight.data.transpose(0, 1)
    )
    length = rows.flatten(1).square().sum(1)
    if producer.bias is not None and not norm:
        length = length + producer.bias.data.square()
    factor = length.rsqrt()
    rows *= factor.view(-1, *[1] * (rows.ndim - 1))
    rows[half:] = 0.5 * rows[:half]
    if producer.bias is not None:
        producer.bias.data *= factor
        producer.bias.data[half:] = 0.5 * producer.bias.data[:half]
    if norm:
        norm = model.get_submodule(norm)
        norm.eps = 0.0
        for tensor, scale in ((norm.running_mean, 0.5), (norm.running_var, 0.25), (norm.weight, 0.7), (norm.bias, 0.7)):
            tensor.data[half:] = scale * tensor.data[:half]


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    pieces=st.lists(st.tuples(st.sampled_from(PIECES), st.integers(0, 17)), min_size=1, max_size=6),
    ending=st.sampled_from(["mean", "flatten", "two"]),
    scope=st.sampled_from(["hidden", "all"]),
    ratio=st.sampled_from([0.25, 0.5, 0.7]),
    seed=st.integers(0, 1000),
)
def test_random_networks(pieces, ending, scope, ratio, seed):
    model, images = build(pieces, ending, seed)
    with torch.no_grad():
        outputs = model(images)
        found = trace(model, images, scope)
        result = compress(model, images, "prune", ratio=ratio, scope=scope)
        narrow = result.model(images)
        assert narrow.shape == outputs.shape
        scale = outputs.abs().max()
        assert (narrow - masked(model, result, found.sites)(images)).abs().max() <= 1e-5 * scale
        assert torch.equal(compress(model, images, ratio=0, scope=scope).model(images), outputs)

        if seed % 4 == 0:  # a quarter of them: it takes longer
            x = torch.randn(16, *images.shape[1:], dtype=images.dtype, generator=torch.Generator().manual_seed(seed))
            common = {"ratio": ratio, "scope": scope, "calibration": x}
            gaps = [compress(model, images, "prune", refit=rounds, **common).model(x) - model(x) for rounds in (0, 1)]
            assert gaps[1].square().mean() <= 1.05 * gaps[0].square().mean() + 1e-12 * scale**2
        if seed % 4 == 1:  # another quarter
            x = torch.randn(16, *images.shape[1:], dtype=images.dtype, generator=torch.Generator().manual_seed(seed))
            common = {"scope": scope, "calibration": x}
            gaps = [compress(model, images, method, ratio=ratio, **common).model(x) - model(x)
                    for method in ("prune", "reconstruct")]  # fmt: skip
            assert gaps[1].square().mean() <= 1.05 * gaps[0].square().mean() + 1e-12 * scale**2
            assert torch.equal(compress(model, images, "reconstruct", ratio=0, **common).model(images), outputs)

        for site in found.sites:
            claimed = site.step == 1 and not any(consumer.obstacle for consumer in site.consumers)
            norms = {consumer.norm for consumer in site.consumers}
            one_row = site.producers[0].even(site.width) and site.producers[0].positions().shape[1] == 1
            if not claimed or not one_row or len(site.producers) > 1 or len(norms) > 1 or site.width % 2:
                continue
            twins = copy.deepcopy(model)
            duplicate(twins, site)
            expected = twins(images)
            widths = {site.name: site.width // 2}
            merged = compress(twins, images, "merge", "l2-norm", ratio=0, widths=widths, scope=scope,
                              formulation="consistent", threshold=0.99)  # fmt: skip
            row = next(row for row in merged.report.sites if row.name == site.name)
            if row.merged:
                assert (merged.model(images) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-3), row
            assert row.merged == site.width // 2 or row.note, row
