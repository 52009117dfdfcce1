"""Inputs of several tensors: everything that reads images reads them."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import InputError, compress
from nm_lightning.compression.files.export import export
from nm_lightning.compression.structure.cost import cost
from nm_lightning.compression.structure.inputs import call


class Gated(nn.Module):
    """An image of numbers, gated by a table."""

    def __init__(self):
        super().__init__()
        self.a, self.c, self.b, self.out = nn.Linear(6, 12), nn.Linear(5, 12), nn.Linear(12, 16), nn.Linear(16, 4)

    def forward(self, image, table):
        return self.out(F.relu(self.b(F.relu(self.a(image)) * self.c(table).sigmoid())))


IMAGES, TABLES, LABELS = torch.randn(40, 6), torch.randn(40, 5), torch.zeros(40)
PAIR, NAMED = (IMAGES[:2], TABLES[:2]), {"image": IMAGES[:2], "table": TABLES[:2]}
SOURCES = {
    "tuple": (PAIR, (IMAGES, TABLES)),
    "dictionary": (NAMED, {"image": IMAGES, "table": TABLES, "label": LABELS}),
    "loader of tuples": (PAIR, [(IMAGES[:20], TABLES[:20], LABELS[:20]), (IMAGES[20:], TABLES[20:], LABELS[20:])]),
    "loader of pairs": (PAIR, [((IMAGES[:20], TABLES[:20]), LABELS), ((IMAGES[20:], TABLES[20:]), LABELS)]),
    "loader of dictionaries": (NAMED, [{"image": IMAGES, "table": TABLES, "label": LABELS}]),
    "loader of dictionaries and labels": (NAMED, [({"image": IMAGES, "table": TABLES}, LABELS)]),
}
READERS = [
    {"criterion": "output"},
    {"reconstruction": "channel"},
    {"refit": 1},
    {"finetune": 1},
    {"recalibrate_norm": True},
    {"target_macs": 0.6, "ratio": None},
]


@pytest.mark.parametrize("source", SOURCES)
def test_reconstruction_reads_them_however_they_come(source):
    torch.manual_seed(0)
    model, (example, images) = Gated(), SOURCES[source]
    found = compress(model, example, "reconstruct", ratio=0.5, calibration=images)
    wanted = compress(model, PAIR, "reconstruct", ratio=0.5, calibration=(IMAGES, TABLES))
    assert found.report.widths == {"a": 6, "b": 8}
    torch.testing.assert_close(found.model.state_dict(), wanted.model.state_dict())


@pytest.mark.parametrize("settings", READERS)
def test_whoever_reads_images_reads_them(settings):
    torch.manual_seed(0)
    for example, images in (SOURCES["tuple"], SOURCES["dictionary"]):
        result = compress(
            Gated(), example, "reconstruct", calibration=images, **{"ratio": 0.5, "scope": "all"} | settings
        )
        assert call(result.model, example).shape == (2, 4)
        assert result.report.widths["b"] < 16


def test_cost_and_export_take_them(tmp_path):
    assert cost(Gated(), PAIR) == cost(Gated(), NAMED)
    assert cost(Gated(), PAIR).macs == 6 * 12 + 5 * 12 + 12 * 16 + 16 * 4
    for example in (PAIR, NAMED):
        program = torch.export.load(export(Gated(), example, tmp_path / "net.pt2")).module()
        longer = (IMAGES, TABLES) if isinstance(example, tuple) else {"image": IMAGES, "table": TABLES}
        assert call(program, longer).shape == (40, 4)


def test_what_is_no_input_is_refused_in_one_line():
    with pytest.raises(InputError, match="example_input is a list"):
        compress(Gated(), [1, 2])
    with pytest.raises(InputError, match="give batches that are tensors"):
        compress(Gated(), NAMED, "reconstruct", calibration=[(IMAGES, TABLES)])
