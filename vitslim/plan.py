"""Plan: what every block of a slim model keeps, as JSON. Standard library only."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True)
class BlockPlan:
    """What one block keeps; None where the search left a part alone.

    Attributes:
        heads: For every head the sorted dimensions kept; a head may keep none.
        hidden: The sorted hidden units of the MLP kept.
        tokens: The sorted patches that are still there in this block, counted from the first
            patch in row-major order; prefix tokens (class, distillation, register) always stay.
    """

    heads: list[list[int]] | None = None
    hidden: list[int] | None = None
    tokens: list[int] | None = None

    @property
    def head_dims(self) -> list[int] | None:
        """The width of every head."""
        return None if self.heads is None else [len(head) for head in self.heads]


@dataclass(frozen=True)
class Plan:
    """What every block keeps, which budget asked for it and what it costs.

    Attributes:
        base: {"model": timm name, "args": arguments of timm.create_model} of the dense model.
        budget: What was asked for, e.g. {"macs": "60%"}.
        reached: {"params", "macs"} of the slim model, in parameters and multiply-accumulates.
        round_to: Widths are multiples of this, or the full width.
        blocks: One entry per transformer block.
    """

    base: dict[str, Any]
    budget: dict[str, Any]
    reached: dict[str, int]
    round_to: int
    blocks: list[BlockPlan] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns the JSON object of this plan."""
        return {"format": FORMAT, **asdict(self)}

    def to_json(self) -> str:
        """Returns the plan as JSON text, one line per block."""
        whole = self.to_dict()
        blocks = ",\n  ".join(json.dumps(block) for block in whole.pop("blocks"))
        return json.dumps(whole)[:-1] + f', "blocks": [\n  {blocks}\n]}}\n'

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Plan":
        """Builds a plan from its JSON object.

        Raises:
            ValueError: It is not a plan, is of another format version, or its indices are broken.
        """
        if not isinstance(data, Mapping) or "blocks" not in data or "format" not in data:
            raise ValueError("this is not a vitslim plan: it lacks `format` or `blocks`")
        if data["format"] != FORMAT:
            raise ValueError(f"plan format {data['format']} is not the format {FORMAT} read here")
        try:
            blocks = [BlockPlan(**block) for block in data["blocks"]]
            names = ("base", "budget", "reached", "round_to")
            plan = cls(**{name: data[name] for name in names}, blocks=blocks)
        except (TypeError, KeyError) as error:
            raise ValueError(f"the plan has a missing or unknown entry: {error}") from None
        plan._check()
        return plan

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """Builds a plan from JSON text; raises ValueError as `from_dict` does."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"the plan is not JSON: {error}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan as JSON, beside and then renamed."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(self.to_json())
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan; raises ValueError with the path in front of the reason."""
        try:
            return cls.from_json(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read the plan {path}: {error}") from None

    def _check(self) -> None:
        alive: set[int] | None = None
        for index, block in enumerate(self.blocks):
            kept = [*(block.heads or []), block.hidden or [], block.tokens or []]
            for indices in kept:
                if not all(isinstance(i, int) and i >= 0 for i in indices):
                    raise ValueError(f"block {index} of the plan has an index that is no index")
                if any(a >= b for a, b in pairwise(indices)):
                    raise ValueError(f"block {index} of the plan has indices that do not increase")
            if block.tokens is not None:
                if alive is not None and not alive.issuperset(block.tokens):
                    raise ValueError(f"block {index} of the plan brings back a dropped token")
                alive = set(block.tokens)
