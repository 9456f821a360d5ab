"""Family header as JSON and back, for the `families` table. Torch-free.

Not a file format; see docs/reference/format.md for that. The digest covers the family's tensors,
which are not part of the header, so it is stored with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_vllm.formats.adapter import LoRAShape
from safegene_vllm.formats.family import Base, FamilyHeader, SelectedLayer


def header_json(header: FamilyHeader) -> dict[str, Any]:
    """Convert a header, without its path, to JSON."""
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
    """Parse the result of `header_json`."""
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
