"""What a compression did: one row for each site, and the layers left alone."""

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
        notes = [*self.remarks, *(f"{site.name}: {site.note}" for site in self.sites if site.note)]
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
        return "\n".join(rows + [f"{name:32} left alone: {reason}" for name, reason in self.skipped.items()])
