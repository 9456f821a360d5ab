"""A family's header as JSON and back, for the registry's `families` table. Torch-free.

Not a format for disks: docs/reference/format.md has that. The digest covers the family's
tensors, which are not here, so it is taken from whoever has read them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_vllm.formats.adapter import LoRAShape
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer


def header_json(header: FamilyHeader) -> dict[str, Any]:
    """Everything of `header` but its path."""
    return {
        "name": header.name,
        "digest": header.digest,
        "base": {
            "architecture": header.base.architecture,
            "num_layers": header.base.num_layers,
            "fingerprint": header.base.fingerprint,
        },
        "sites": {
            site: {"rank": s.rank, "d_in": s.d_in, "d_out": s.d_out, "dtype": s.dtype}
            for site, s in header.sites.items()
        },
        "layers": [{"layer": entry.layer, "score": entry.score} for entry in header.layers],
        "coefficient_bounds": list(header.bounds),
        "recipe": dict(header.recipe),
    }


def parse_header(raw: Mapping[str, Any]) -> FamilyHeader:
    """The header that `header_json` wrote."""
    low, high = raw["coefficient_bounds"]
    return FamilyHeader(
        base=Base(**raw["base"]),
        sites={site: LoRAShape(site=site, **shape) for site, shape in raw["sites"].items()},
        layers=tuple(SelectedLayer(entry["layer"], entry["score"]) for entry in raw["layers"]),
        bounds=(float(low), float(high)),
        recipe=raw["recipe"],
        name=raw["name"],
        digest=raw["digest"],
    )
