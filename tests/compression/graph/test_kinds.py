"""Kinds of code that networks of timm and transformers have, as small modules: narrow is what it is masked."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nm_lightning import compress
from tests.oracles import masked
