"""What a module's attributes say of an attention's heads, by their names."""

import re


def tell_apart(choices: dict[int, dict[str, int]], ndim: int) -> None:
    """Where there are as many heads as each is long, their number comes first, and their length last.

    Args:
        choices: by dimension, the attributes that may count it, each with a divisor; changed in place.
        ndim: of the tensor that is cut into heads.
    """
    lengths = {name for names in choices.values() for name in names if "head" in name and re.search("dim|size", name)}
    numbers = {name for names in choices.values() for name in names if "head" in name} - lengths
    both = [dim for dim, names in choices.items() if names.keys() & lengths and names.keys() & numbers]
    for dim in both:
        last = dim == ndim - 1 or dim in both[1:]
        choices[dim] = {name: each for name, each in choices[dim].items() if (name in numbers) is not last}
