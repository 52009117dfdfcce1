"""Unlabelled images of a data module, shared out among ranks."""

import pytest

from nm_lightning.compression.statistics.ranks import Ranks
from nm_lightning.data import build_data
from nm_lightning.errors import InputError


def test_fewer_images_than_ranks():
    class Four:
        world_size, global_rank = 4, 0

    with pytest.raises(InputError, match="calibration_size 3 leaves some of 4 ranks without an image"):
        build_data("digits").calibration_images("data", 3, ranks=Ranks(Four()))
