"""Batches and outputs as people have them."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from nm_lightning.batches import hits, inputs_and_labels, logits_of, threshold_of
from nm_lightning.errors import InputError
from nm_lightning.measure import evaluate

Pair = namedtuple("Pair", "image label")
Swapped = namedtuple("Swapped", "y path x")


@dataclass
class Output:
    loss: object
    logits: object


@pytest.mark.parametrize(
    ("batch", "keys"),
    [
        (("I", "L"), ()),
        (["I", "L", "weights", "names"], ()),
        (Pair("I", "L"), ()),
        (Swapped("L", "path", "I"), ()),
        *(({"path": "p", image: "I", label: "L"}, ()) for image, label in zip(
            ("image", "images", "pixel_values", "input", "inputs", "x"),
            ("label", "labels", "target", "y", "y", "label"), strict=True)),
        ({"a": "I", "b": "L"}, ("a", "b")),
        (("name", "L", "I"), (2, 1)),
        (("I", "weights", "L"), (None, -1)),
    ],
)  # fmt: skip
def test_inputs_and_labels_are_found(batch, keys):
    assert inputs_and_labels(batch, *keys) == ("I", "L")


def test_what_is_not_there_is_none():
    images = torch.zeros(2, 3)
    assert inputs_and_labels({"a": 1}) == (None, None)
    assert inputs_and_labels([images]) == (images, None)
    assert inputs_and_labels(images)[0] is images and inputs_and_labels(images)[1] is None
    assert inputs_and_labels(("I", "L"), label_key="label") == ("I", None)
    assert inputs_and_labels(None) == (None, None)


def test_logits_are_found():
    assert logits_of(("logits", "features")) == logits_of({"aux": 1, "logits": "logits"}) == "logits"
    assert logits_of(Output("loss", "logits")) == logits_of("logits") == "logits"


class Dicts(Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": self.labels[index]}


class Signs(nn.Module):
    """Says class 1 where the sum is positive."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc = kind, nn.Linear(4, 1, bias=False)
        nn.init.ones_(self.fc.weight)

    def forward(self, x):
        z = self.fc(x)
        return {
            "one": z,
            "flat": z[:, 0],
            "probability": z.sigmoid(),
            "flat probability": z.sigmoid().squeeze(1),
            "two": torch.cat([-z, z], 1),
            "tuple": (torch.cat([-z, z], 1), x),
            "dict": {"logits": z, "features": x},
            "dataclass": Output(None, z),
        }[self.kind]


@pytest.mark.parametrize(
    "kind", ["one", "flat", "probability", "flat probability", "two", "tuple", "dict", "dataclass"]
)
def test_the_accuracy_is_the_true_one(kind):
    images = torch.randn(90, 4, generator=torch.Generator().manual_seed(0))
    labels = (images.sum(1) > 0).long()
    labels[:9] = 1 - labels[:9]
    for kept in (labels, labels[:, None]):
        assert evaluate(Signs(kind), DataLoader(Dicts(images, kept), 16)) == pytest.approx(0.9)
    if kind not in ("two", "tuple"):
        assert evaluate(Signs(kind), DataLoader(Dicts(images, labels.float()), 16)) == pytest.approx(0.9)


def test_what_are_no_class_labels_is_said():
    logits = torch.zeros(4, 3)
    for labels in (torch.zeros(4), torch.zeros(4, 2).long(), torch.zeros(4, 8, 8).long(), None, torch.zeros(3).long()):
        assert hits(logits, labels) is None
    assert hits(torch.zeros(4, 1), torch.tensor([0, 1, 2, 3])) is None, "a regression"
    assert hits(torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8).long()) is None, "a segmentation"
    assert threshold_of(torch.ones(3, 1, requires_grad=True).sigmoid() * 2) == 0
    with pytest.raises(InputError, match="the batches hold no class labels"):
        evaluate(nn.Linear(4, 3), DataLoader(Dicts(torch.zeros(4, 4), torch.zeros(4, 2)), 2))


class Vanishing(Dicts):
    def __getitem__(self, index):
        if index == 3:
            raise FileNotFoundError(2, "No such file or directory", "images/3.png")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_changes_under_way_is_one_line(workers):
    loader = DataLoader(Vanishing(torch.zeros(4, 4), torch.zeros(4).long()), 2, num_workers=workers)
    with pytest.raises(InputError, match=r"can't be read, has it changed\? .*images/3.png") as caught:
        evaluate(nn.Linear(4, 3), loader)
    assert len(str(caught.value).splitlines()) == 1
