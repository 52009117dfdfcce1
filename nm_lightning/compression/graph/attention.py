"""Attention whose heads can be turned: between its Linear layers and its products nothing but moves and factors.

Then any invertible map of a head's queries with its inverse on the keys, or of its values with its inverse on what
reads them, leaves the network as it is, and dimensions can be chosen freely. A rotary embedding, a norm or whatever
else lies between makes an end of that.
"""

from collections.abc import Set
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from nm_lightning.compression.graph.follow import Follower
from nm_lightning.compression.graph.neurons import Facts, Product, neurons_in
from nm_lightning.compression.graph.nodes import operation_at_home
from nm_lightning.compression.structure.operations import facts_of
from nm_lightning.compression.structure.sites import Member, Pair

PRODUCTS = {"matmul", "bmm", "einsum", "scaleddotproductattention"}
LINEAR = {"contiguous", "clone", "detach", "float", "to", "typeas", "size", "dim"}  # of those for each entry


def modules_with_heads(facts: Facts, alone: bool) -> Set[str]:
    """The modules whose code multiplies neurons with neurons; only those with a single head if it is `alone`."""
    products = [product for product in facts.products if product.module is not None]
    several = {product.module for product in products if len(product.sides[0]) > 1}
    return {product.module for product in products} - (several if alone else set())


def find_pairs(follower: Follower, facts: Facts) -> list[Pair]:
    """The pairs of all modules whose heads get shorter; their neurons are counted over the network."""
    pairs = []
    for module in facts.shorter:
        products = [each for each in facts.products if each.module == module and each.node in follower.origins]
        own = torch.cat([side.flatten() for product in products for side in product.sides])
        if len(own.unique()) == len(own) and _straight(follower, own, {product.node for product in products}):
            pairs += filter(None, (_pair(follower, facts, product) for product in products))
    return pairs


def turned(pairs: list[Pair], facts: Facts, follower: Follower) -> Set[str]:
    """The modules all of whose products are a pair."""
    products = [each.module for each in facts.products if each.node in follower.origins]
    made = [pair.module for pair in pairs]
    return {module for module in made if made.count(module) == products.count(module)}


def renumbered(pair: Pair, number: Tensor) -> Pair:
    """The pair as its site counts its neurons."""
    return replace(pair, neurons=number[pair.neurons])


def _straight(follower: Follower, own: Tensor, products: Set[fx.Node]) -> bool:
    """Whether nothing but Linear layers, moves, factors and these products see an attention's neurons."""
    for node, origin in follower.origins.items():
        if not torch.isin(neurons_in(origin), own).any():
            continue
        layer = follower.root.get_submodule(node.target) if node.op == "call_module" else None
        if follower.roles.get(node) == "produce":
            if not _is_linear(layer):
                return False
        elif node not in products and not _keeps_lines(follower, node, layer):
            return False
        for user in node.users:
            reads = torch.isin(neurons_in(follower.origins.get(user)), own).any() or user in products
            reader = follower.root.get_submodule(user.target) if user.op == "call_module" else None
            number = isinstance(follower.recorder.values.get(user), (int, torch.Size))
            if not reads and not number and not _is_linear(reader):
                return False
    return True


def _is_linear(layer: nn.Module | None) -> bool:
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def _keeps_lines(follower: Follower, node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether it is linear in an attention's dimensions, and treats them alike."""
    facts, role = facts_of(operation_at_home(node, layer)), follower.roles.get(node)
    if facts.kind == "entry":
        return facts.idle or operation_at_home(node, layer) in LINEAR
    return role == "move" or (role == "scale" and facts.kind in ("product", "quotient"))


def _pair(follower: Follower, facts: Facts, product: Product) -> Pair | None:
    """The layers on both sides of a product."""
    neurons, held = product.sides[0], [each for each in facts.members.values() if each.slots]
    ends = [(own, side) for side in product.sides for own in held if torch.isin(own.owner, side).any()]
    kinds = [own.kind for own, _ in ends]
    if kinds not in (["rows", "rows"], ["rows", "columns"]) or neurons.shape != product.sides[-1].shape:
        return None
    rows, places = (_places(own, side) for own, side in ends)
    if rows is None or places is None:
        return None
    (maker, _), (other, _) = ends
    dim, centred = int(other.kind == "columns"), _softmax_behind(follower, product.node)
    return Pair(product.module, neurons, maker.name, rows, other.name, places, dim, product.rooted, centred)


def _places(member: Member, neurons: Tensor) -> Tensor | None:
    """Where a layer has each of some neurons; None unless it has each once."""
    same = neurons.reshape(-1, 1) == member.owner
    return same.long().argmax(dim=1).view(neurons.shape) if bool((same.sum(dim=1) == 1).all()) else None


def _softmax_behind(follower: Follower, node: fx.Node) -> bool:
    """Whether the first thing behind a product that is not for each entry is a softmax."""
    ahead = [node]
    while ahead:
        here = ahead.pop()
        layer = follower.root.get_submodule(here.target) if here.op == "call_module" else None
        name = operation_at_home(here, layer)
        if name in ("softmax", "scaleddotproductattention"):
            return True
        if here is node or facts_of(name).kind in ("entry", "sum", "product", "quotient", "move"):
            ahead += here.users
    return False
