"""What a compression did: one row for each site, and the layers left alone."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass
class SiteReport:
    """What happened at one site.

    Attributes:
        name: the producing layer.
        before: neurons of the original.
        after: neurons that stayed.
        method: the method that was used, which may be a fallback.
        merged: removed neurons that were folded into a kept one.
        negative: negative scaling entries, which a ReLU does not pass (the published formulation has some).
        note: why the method fell back, if it did.
        error: share of the consumers' output energy that reconstruction could not restore; None elsewhere.
    """

    name: str
    before: int
    after: int
    method: str
    merged: int = 0
    negative: int = 0
    note: str = ""
    error: float | None = None


@dataclass
class Report:
    """All sites of one compression.

    Attributes:
        sites: a row for each.
        skipped: the layers that were left alone, with the reason.
        remarks: further ones.
        compared: how the narrow network was compared with the masked wide one.
    """

    sites: list[SiteReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    compared: str = ""

    @property
    def widths(self) -> dict[str, int]:
        """Neurons that stayed, by site."""
        return {site.name: site.after for site in self.sites}

    @property
    def notes(self) -> list[str]:
        """The sentences that a reader of the result should see."""
        noted = by_reason({site.name: site.note for site in self.sites if site.note})
        notes = [*self.remarks, *(f"{several(names)}: {note}" for names, note in noted)]
        negative = sum(site.negative for site in self.sites)
        if negative:
            notes.append(f"{negative} negative scaling entries kept, as published")
        return notes

    def to_dict(self) -> dict:
        """Plain dictionaries and lists, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        """A table in plain text, a line for each site."""
        rows = [f"{'site':32} {'before':>7} {'after':>7} {'merged':>7}  method"]
        for site in self.sites:
            note = f" ({site.note})" if site.note else ""
            rows.append(f"{site.name:32} {site.before:7} {site.after:7} {site.merged:7}  {site.method}{note}")
        return "\n".join(rows + [f"{several(names):32} left alone: {why}" for names, why in by_reason(self.skipped)])


def by_reason(reasons: Mapping[str, str]) -> list[tuple[list[str], str]]:
    """Layers that share a reason; those that differ in no more than the layers they name count as one.

    >>> by_reason({"a": "read by c", "b": "added to d", "c": "read by a", "d": "added to b", "e": "it is the end"})
    [(['a', 'c'], 'read by others'), (['b', 'd'], 'added to others'), (['e'], 'it is the end')]
    """
    name = "|".join(map(re.escape, sorted(reasons, key=len, reverse=True)))
    listed = re.compile(rf"(?<![\w.])(?:{name})(?:, (?:{name}|\.\.\.))*(?![\w.]|\.\w)" if name else "(?!)")
    groups: dict[str, list[str]] = defaultdict(list)
    for layer, reason in reasons.items():
        groups[listed.sub("others", reason)].append(layer)
    alike = {text: {reasons[layer] for layer in layers} for text, layers in groups.items()}
    return [(layers, alike[text].pop() if len(alike[text]) == 1 else text) for text, layers in groups.items()]


def several(names: list[str], shown: int = 3) -> str:
    """The first names, and how many there are.

    >>> several(["a"]), several(["a", "b", "c", "d"])
    ('a', 'a, b, c, ... (4)')
    """
    return ", ".join(names[:shown]) + (f", ... ({len(names)})" if len(names) > shown else "")
