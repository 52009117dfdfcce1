"""Following neurons through a network's graph: which neuron each entry of each activation comes from.

The graph is run on an example without its data (PyTorch's meta device). Beside every activation travels an integer
tensor of the same shape, of its neurons. Reshapes, concatenations and other movements are simply executed on it; a
Linear or Conv that reads it learns which neuron owns which of its input columns, and makes new neurons; an addition or
a product ties the neurons that meet in it; an operation without a rule freezes what it reads, with a reason. No
architecture is known by name.
"""

import operator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from nm_lightning.compression.graph.attributes import attributes_of, counts_heads
from nm_lightning.compression.graph.neurons import (
    Facts,
    Quota,
    Tie,
    along,
    compact,
    components,
    constant,
    is_nobodys,
    lay_along,
    nobody,
    owned,
    shrink,
    tied_pairs,
    varying,
)
from nm_lightning.compression.graph.nodes import in_place, operation_at_home, operation_name, where
from nm_lightning.compression.graph.rules import Call, known, taught
from nm_lightning.compression.graph.tracer import Recorder, leaves_of
from nm_lightning.compression.structure.inputs import Inputs
from nm_lightning.compression.structure.operations import LAYERS, facts_of
from nm_lightning.compression.structure.sites import Member

# where sizes only give shapes
SHAPED = {"zeros", "ones", "empty", "newzeros", "newones", "newempty", "rand", "randn", "layernorm"}
SHAPED |= {"conv1d", "conv2d", "conv3d"}  # of which it is the number of groups
SHAPED_KINDS = {"move", "pool", "resample", "pad"}

Slots = list[tuple[str, int]]  # see `Member`
Counts = dict[str, int | Fraction] | None


class Follower:
    """Runs a network, and finds with each value the tensor of the neurons that its entries come from.

    Args:
        root: the network.
        facts: what was seen before, to be added to.
        given: the neurons that a layer makes, where they are known; new ones elsewhere.
        before: the members of the network that this one was narrowed from.

    Attributes:
        origins: the neurons that each node's value carries.
        root: the network.
        apart: the nodes that take channels by their place.
        roles: what each node does to a neuron: `produce`, `norm`, `move`, `scale`, or an obstacle's sentence.
        failed: whether the network itself failed, and not the following.
    """

    def __init__(
        self,
        root: nn.Module,
        facts: Facts,
        given: dict[str, Tensor] | None = None,
        before: dict[tuple[str, str], Member] | None = None,
    ):
        self.root = root
        self.recorder = Recorder(root)
        self.graph = self.recorder.graph
        self.facts, self.given, self.before = facts, given or {}, before or {}
        self.origins: dict[fx.Node, Any] = {}
        self.roles: dict[fx.Node, str] = {}
        self.apart: set[fx.Node] = set()
        self.failed = False
        self.known_ties, self.same = -1, torch.empty(0, dtype=torch.long)  # labels by so many ties, see `whole`

    @torch.no_grad()
    def run(self, inputs: Inputs) -> None:
        """Run the network on an example, and follow what was recorded; whatever its code raises is raised."""
        error = None
        try:
            self.recorder.record(inputs)
        except Exception as raised:
            error, self.failed = raised, True
        for node in self.graph.nodes:
            if node in self.recorder.values or node.op == "output":
                self.step(node)
        if error is not None:
            raise error
        for size in self.recorder.escaped:
            self._hold_measured(size, f"its number of channels is read{where(size)}")
        for size, other, module in self.recorder.compared:
            if type(other) is int and size.number == other:
                self._expect(size.node, other, module)

    def step(self, node: fx.Node) -> None:
        """Follow one node."""
        layer = self.root.get_submodule(node.target) if node.op == "call_module" else None
        operation = operation_at_home(node, layer)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.recorder.values.__getitem__)
        origins = fx.node.map_aggregate((node.args, node.kwargs), self._origin)
        sources = [origin for origin in leaves_of(origins) if isinstance(origin, Tensor)]
        value = self.recorder.values.get(node)
        name = node.target if layer is not None else ""
        self.origins[node] = self._follow(Call(node, operation, layer, args, kwargs, origins, sources, value, name))
        if in_place(node, layer):
            changed = node.args[0] if node.args else None
            if isinstance(changed, fx.Node) and len(changed.users) > 1 and self.roles.get(node) != "move":
                self.roles[changed] = f"changed in place by {operation_name(node, None)}"

    def _origin(self, argument: Any) -> Any:
        """The neurons of a node; nobody's entries in the place of a constant tensor."""
        if isinstance(argument, fx.Node):
            return self.origins[argument]
        return nobody(argument) if isinstance(argument, Tensor) else argument

    def _follow(self, call: Call) -> Any:
        """The neurons of a node's result."""
        node, sources = call.node, call.sources
        if node.op == "output":
            for source in sources:
                self.freeze(source, "its neurons are the network's outputs")
            return None
        if node.op == "get_attr" and isinstance(call.value, Tensor):
            return self._parameter(call)
        results = any(isinstance(result, Tensor) for result in leaves_of(call.value))
        if results and node.op != "call_module":
            self._hold_numbers(call)
        if node.op in ("placeholder", "get_attr") or not sources or not results:
            return nobody(call.value)
        rules = taught(node.target if call.layer is None else call.layer)
        if not rules and facts_of(call.operation).kind != "layer" and all(map(is_nobodys, sources)):
            return nobody(call.value)
        for rule in (*rules, *known(call.operation)):
            followed = rule(self, call)
            if followed is not None:
                self.roles.setdefault(node, f"{call.name or call.operation} may not pass a factor on")
                return followed
        for source in sources:
            self.freeze(source, f"read by {call.operation}, which is not followed{where(node)}")
        return nobody(call.value)

    # -- what rules may ask

    def slots(self, call: Call, dim: int, *attributes: str) -> Slots:
        """Those of a layer's tensors that exist, each with its axis: the first has it at `dim`, the others at 0."""
        found = []
        for position, attribute in enumerate(attributes):
            tensor = getattr(call.layer, attribute, None)
            if tensor is not None:
                found.append((self.name_of(tensor, f"{call.name}.{attribute}"), 0 if position else dim))
        return found

    def name_of(self, tensor: Tensor, otherwise: str) -> str:
        """The first name that the network has for a tensor."""
        return self.recorder.names.get(id(tensor), otherwise)

    def module_named(self, name: str) -> nn.Module | None:
        """The network's module of that name, if there is one."""
        try:
            return self.root.get_submodule(name)
        except AttributeError:
            return None

    # -- what rules say

    def produce(self, call: Call, slots: Slots, dim: int, counts: Counts = None, groups: int = 1) -> Tensor:
        """The layer makes new neurons along `dim` of its value, the same ones whenever it is called again.

        Args:
            call: the layer's.
            slots: the tensors that have a row for each neuron, the weight first.
            dim: the value's.
            counts: the layer's attributes that tell how many these are, each with the divisor of that number.
            groups: equally many must stay in each of so many consecutive runs.
        """
        self.roles[call.node] = "produce"
        width = call.value.shape[dim]
        key = slots[0][0]  # layers that share a weight share its neurons
        if key not in self.facts.blocks:
            neurons = self.given.get(key)
            if neurons is None:
                neurons = torch.arange(self.facts.total, self.facts.total + width)
            self.facts.blocks[key] = neurons
            self.facts.total = max(self.facts.total, int(neurons.max()) + 1)
        neurons = self.facts.blocks[key]
        if len(neurons) != width:
            raise ValueError(f"{call.name} makes {width} neurons, not {len(neurons)}")
        self._note(call, Member(call.name, "rows", slots, counts or {}, neurons))
        if groups > 1:
            self.quota(neurons, groups)
        if self.apart and self._reads_apart(call.node):
            self.freeze(neurons, f"it reads channels that are taken by their place{where(call.node)}")
        return lay_along(neurons, dim, call.value.ndim).expand_as(call.value)

    def _reads_apart(self, node: fx.Node) -> bool:
        """Whether a layer reads some of the channels that another makes, which the code takes by their place.

        Such code counts channels, so what it makes of them stays whole, too; not what such a channel is a gate of.
        """
        ahead, seen = list(node.all_input_nodes), set()
        while ahead:
            here = ahead.pop()
            if here in self.apart:
                return True
            together = operation_name(here, None) in ("cat", "concat", "stack")
            if here not in seen and not together and self.roles.get(here) not in (None, "produce"):
                seen.add(here)
                ahead += [source for source in here.all_input_nodes if self._varies(source) or not self._varies(here)]
        return False

    def _varies(self, node: fx.Node) -> bool:
        """Whether a value has entries of several neurons."""
        origin = self.origins.get(node)
        return isinstance(origin, Tensor) and bool(varying(origin))

    def read(self, call: Call, slots: Slots, dim: int, counts: Counts = None, groups: int = 1) -> None:
        """The layer's columns read the neurons along `dim` of its source; the arguments are those of `produce`."""
        if isinstance(call.layer, LAYERS) and not type(call.layer).__module__.startswith("torch.nn."):
            self.facts.shapes[call.name] = call.args[0].shape
        neurons = self.settle(call.source, dim)
        axis = dim % call.source.ndim
        self.see(call, Member(call.name, "columns", slots, counts or {}, neurons, groups, axis))
        if groups > 1:
            self.facts.grouped[call.name] = neurons.view(groups, -1)
            self.quota(neurons, groups)

    def shortens(self, call: Call) -> bool:
        """Whether the heads of the module whose code this is get shorter, and not fewer."""
        return call.node.meta.get("module") in self.facts.shorter

    def pass_through(
        self, call: Call, slots: Slots, dim: int, counts: Counts = None, role: str = "", repeats: int = 1
    ) -> Tensor:
        """The layer has parameters for each channel along `dim`.

        Args:
            call: the layer's.
            slots: the tensors that have an entry for each channel.
            dim: the source's and the value's.
            counts: the layer's attributes that tell how many these are, each with the divisor of that number.
            role: `scale` if a channel's factor passes; else why it does not.
            repeats: the channels that come of each.
        """
        self.roles[call.node] = role or f"{call.name} has a parameter for each channel"
        neurons = self.settle(call.source, dim).repeat_interleave(repeats)
        if slots or counts:
            self.see(call, Member(call.name, "channels", slots, counts or {}, neurons, axis=dim))
        return lay_along(neurons, dim, call.value.ndim).expand_as(call.value)

    def see(self, call: Call, member: Member, at: str = "") -> None:
        """Note what a layer reads; a layer called again ties what it reads now to what it read before.

        Args:
            call: the layer's.
            member: its axis, of the kind `columns` or `channels`; the owners are the neurons that it reads.
            at: sets it apart from others that the same layer has of this kind.
        """
        key, neurons = self._note(call, member, at), member.owner
        for slot in member.slots or [key]:
            before = self.facts.axes.setdefault(slot, neurons)
            if not torch.equal(before, neurons):
                if len(before) != len(neurons):
                    raise ValueError(f"{member.name} reads {len(neurons)} neurons, not {len(before)}")
                self.tie(before, neurons, f"{member.name} or its weight is used several times", additive=True)
        if not member.slots:
            self._count_alike(member)

    def _count_alike(self, member: Member) -> None:
        """A number that is an attribute is the same wherever it is read: equally many stay of all that it counts."""
        for name, divisor in member.counts.items():
            counted = member.owner[::divisor]  # runs of so many stay or go as one
            first = self.facts.axes.setdefault((member.name, name), counted)
            if not torch.equal(first, counted):
                together = torch.cat([first, counted])
                self.quota(together, 2)
                self.facts.chains.append(owned(together))

    def settle(self, source: Tensor, dim: int) -> Tensor:
        """The neuron of each position along `dim`; several that share a position are tied."""
        neurons = along(source, dim)
        if not all(constant(source, other) for other in range(source.ndim) if other != dim % source.ndim):
            reason = "several of its neurons are read through one weight"
            self.tie(lay_along(neurons, dim, source.ndim), source, reason)
        return neurons

    def whole(self, source: Tensor, dim: int) -> bool:
        """Whether all along `dim` stays or goes together, by what was tied so far, as the channels of whole heads."""
        if len(varying(source)) < 2:
            return constant(source, dim)
        return constant(self._labels()[compact(source)].expand_as(source), dim)

    def in_order(self, neurons: Tensor) -> Tensor:
        """Neurons `(n,)`, of which only the number counts, so that those that stay or go as one are side by side."""
        return neurons[self._labels()[neurons].argsort(stable=True)]

    def _labels(self) -> Tensor:
        """What stays or goes as one, by what was tied so far: `(neurons + 1,)`."""
        if (self.known_ties, len(self.same)) != (len(self.facts.ties), self.facts.total + 1):
            self.known_ties = len(self.facts.ties)
            self.same = components(self.facts.total + 1, tied_pairs(self.facts))
        return self.same

    def stop(self, call: Call, reason: str) -> Any:
        """What the call reads can't shrink."""
        self.freeze(call.source, reason)
        return nobody(call.value)

    def freeze(self, neurons: Tensor, reason: str) -> None:
        """These can't be removed."""
        self.facts.frozen.append((compact(neurons).unique(), reason))

    def tie(self, first: Tensor, second: Tensor, reason: str, additive: bool = False) -> None:
        """Those that lie at the same place of two tensors can only be removed together."""
        first, second = torch.broadcast_tensors(first, second)
        dims = [d for d in range(first.ndim) if first.stride(d) == 0 and second.stride(d) == 0 and first.shape[d] > 1]
        first, second = shrink(first, dims).reshape(-1), shrink(second, dims).reshape(-1)
        apart = first != second
        base = self.facts.total + 1
        pairs = ((first[apart] + 1) * base + second[apart] + 1).unique()
        if len(pairs):
            self.facts.ties.append(Tie(pairs // base - 1, pairs % base - 1, reason, additive))

    def tie_runs(self, neurons: Tensor, length: int, reason: str) -> Tensor:
        """Each run of so many of `neurons` `(n,)` can only be removed together; the first of each `(n / length,)`."""
        runs = neurons.view(-1, length)
        self.tie(runs, runs[:, :1], reason)
        return runs[:, 0]

    def hold(self, neurons: Tensor, dim: int, reason: str) -> None:
        """The length along `dim` stays: what is left out is left out at all of its places alike, or nothing is."""
        if constant(neurons, dim):
            return
        if varying(neurons) == [dim % neurons.ndim]:
            self.freeze(neurons, reason)
        else:
            self.tie(neurons, neurons.narrow(dim, 0, 1).expand_as(neurons), reason)

    def measured(self, size: fx.Node) -> list[tuple[Tensor, int]]:
        """What a number in the graph was computed from: the neurons of tensors, with the dimensions measured."""
        if size.op == "call_method" and size.target == "size" and isinstance(self.origins.get(size.args[0]), Tensor):
            return [(self.origins[size.args[0]], size.args[1])]
        if size.op == "call_method" and size.target == "numel" and isinstance(self.origins.get(size.args[0]), Tensor):
            return [(self.origins[size.args[0]], dim) for dim in range(self.origins[size.args[0]].ndim)]
        if isinstance(self.recorder.values.get(size), (int, float)):
            return [found for source in size.all_input_nodes for found in self.measured(source)]
        return []

    def moved(self, node: fx.Node, neurons: Tensor) -> Tensor:
        """What a node that only moves entries makes of other neurons than those of its first source."""
        source, values = node.args[0], self.recorder.values
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda each: neurons if each is source else values[each])
        args = pytree.tree_map_only(
            Tensor, lambda each: torch.zeros_like(each, device="cpu") if each.is_meta else each, args
        )
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _hold_measured(self, size: fx.Node, reason: str) -> None:
        """The number stays: what it was measured of does, or, of a head's length, whole runs of that length do."""
        if size.target is operator.floordiv and self._counts_heads(size):
            for neurons, dim in self.measured(size.args[0]):
                if not constant(neurons, dim):
                    runs = self.settle(neurons, dim)
                    self.tie_runs(runs, len(runs) // size.args[1], reason)
        elif size.op == "call_function" and isinstance(self.recorder.values.get(size), (int, float)):
            for source in size.all_input_nodes:
                self._hold_measured(source, reason)
        else:
            for neurons, dim in self.measured(size):
                self.hold(neurons, dim, reason)

    def _expect(self, size: fx.Node, number: int, module: str) -> None:
        """The module's attributes of that number, which its code expects to be that of these neurons, go with it."""
        for neurons, dim in self.measured(size) if size.target == "size" else ():
            for name in () if constant(neurons, dim) else attributes_of(self.module_named(module), number):
                if len(varying(neurons)) > 1 and not counts_heads(name):
                    continue  # as the number of a block's paths
                call = Call(size, "", None, (), {}, (), [], None)
                member = Member(module, "channels", [], {name: 1}, self.settle(neurons, dim))
                self.see(call, member, f" expected by {name}")

    def _counts_heads(self, size: fx.Node) -> bool:
        """Whether a number is a width divided by the number of heads that the module has as an attribute."""
        width, count = size.args
        if not isinstance(width, fx.Node) or not isinstance(count, int):
            return False
        module = self.module_named(size.meta["module"])
        heads = (
            {name for name, held in vars(module).items() if held == count and counts_heads(name)} if module else set()
        )
        return bool(heads) and self.recorder.values[width] % count == 0

    def _hold_numbers(self, call: Call) -> None:
        """Sizes that enter values: a number of channels that scales them, say, can't change."""
        if call.operation in SHAPED or facts_of(call.operation).kind in SHAPED_KINDS:
            return
        for source in call.node.all_input_nodes:
            self._hold_measured(source, f"its number of channels enters {call.operation}{where(call.node)}")

    def quota(self, neurons: Tensor, groups: int, reason: str = "") -> None:
        """Equally many of each of `groups` consecutive runs must stay; see `Quota`."""
        self.facts.quotas.append(Quota(neurons, torch.arange(groups).repeat_interleave(len(neurons) // groups), reason))

    # -- parameters without a layer

    def bind(self, call: Call, name: str, dim: int) -> Tensor:
        """The parameter that is the call's value makes neurons along `dim`, for others to be tied to."""
        self.facts.parameters.add(name)
        return self.produce(replace(call, name=name), [(name, dim)], dim)

    def is_parameter(self, neurons: Tensor) -> bool:
        """Whether a parameter made them."""
        first = int(compact(neurons).reshape(-1)[0])
        return any(first in block for name, block in self.facts.blocks.items() if name in self.facts.parameters)

    def _parameter(self, call: Call) -> Tensor:
        """A bare parameter with one long dimension: its entries are neurons that others may be tied to."""
        long = [dim for dim, size in enumerate(call.value.shape) if size > 1]
        if all(facts_of(operation_name(user, None)).kind == "layer" for user in call.node.users):
            return nobody(call.value)
        name = self.name_of(call.value, call.node.target)
        if (name, "rows") in self.before:
            return self.bind(call, name, self.before[name, "rows"].slots[0][1])
        if len(long) != 1 or not call.value.is_floating_point():
            self.facts.bare.add(name)
            return nobody(call.value)
        return self.bind(call, name, long[0])

    def _note(self, call: Call, member: Member, at: str = "") -> tuple[str, str]:
        key = (member.name, member.kind + at)
        if key not in self.facts.members:
            self.facts.members[key] = replace(member, node=call.node.name, called=call.node.op == "call_module")
            self.facts.nodes[key] = call.node
        return key
