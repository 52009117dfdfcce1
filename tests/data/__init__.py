import torch


def batches(data, loader):
    """All images and labels of a loader, as the network gets them."""
    parts = [data.on_after_batch_transfer(batch, 0) for batch in loader]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))
