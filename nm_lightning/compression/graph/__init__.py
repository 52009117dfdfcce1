"""First room: which neurons can shrink together, found by following them through a network's graph.

`tracer.py` records the graph, `follow.py` finds the neurons beside its values, by the rules of `layers.py`,
`moves.py`, `channelwise.py`, `arithmetic.py` and the user's own (`rules.py`); `collect.py` makes sites of what was
seen, `trial.py` tries them out, and `trace.py` does it all.
"""

from nm_lightning.compression.graph import arithmetic, channelwise, layers, moves  # noqa: F401 - their rules
from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.nodes import operation_name
from nm_lightning.compression.graph.rules import Call, rule
from nm_lightning.compression.graph.trace import trace
from nm_lightning.compression.graph.tracer import graph_of, shapes_of

__all__ = ["Call", "Follower", "graph_of", "operation_name", "rule", "shapes_of", "trace"]
