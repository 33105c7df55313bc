"""Lists the batch layouts: how the sequences of a batch are laid out in rows, as `batch_layout` names them.

This is the table that every layer reads. `data.packing` builds the rows of a layout, `modeling.layouts` says which
models run it and chooses one.
"""

from __future__ import annotations

from dataclasses import dataclass

AUTO = "auto"
SHARED_PREFIX, PACKED, PADDED = "shared_prefix", "packed", "padded"


@dataclass(frozen=True)
class BatchLayout:
    """Describes a batch layout.

    - `name`: the value of `batch_layout`.
    - `pads`: every sequence has a row of its own, padded on the right. Otherwise all sequences stand in one row, and
      the model's attention has to keep them apart.
    - `shares_prompts`: a prompt stands once, before all of its completions.
    """

    name: str
    pads: bool = False
    shares_prompts: bool = False

    def padding_multiple(self, asked: int | None) -> int | None:
        """Returns the multiple to which rows are padded: the one asked for if the layout pads, else None."""
        return asked if self.pads else None


# Best first; the last one serves every model.
_TABLE = (
    BatchLayout(SHARED_PREFIX, shares_prompts=True),
    BatchLayout(PACKED),
    BatchLayout(PADDED, pads=True),
)
BATCH_LAYOUTS = {layout.name: layout for layout in _TABLE}
# What the argument `batch_layout` may be.
LAYOUT_CHOICES = (AUTO, *BATCH_LAYOUTS)


def layouts_for(*, shares_prompts: bool) -> tuple[str, ...]:
    """Returns the names of the layouts of a method, best first; shares_prompts: whether completions share prompts."""
    return tuple(name for name, layout in BATCH_LAYOUTS.items() if shares_prompts or not layout.shares_prompts)
