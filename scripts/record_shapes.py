"""Record the shapes of timm's models that a schedule can be applied to, in prunesearch/evaluate/timm_shapes.json.

    PYTHONPATH=. python scripts/record_shapes.py               # a few minutes
    PYTHONPATH=. python scripts/record_shapes.py beit eva      # models of these modules of timm; the others stay

Run it after an upgrade of timm and after a change of the shape classes. It builds each model without weights, and once
more for each tag of pretrained weights, because a tag may have another image size or number of classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import timm

from prunesearch.config import ModelConfig
from prunesearch.evaluate.shape_cache import SHIPPED, Facts, find, ship, shipped
from prunesearch.evaluate.timm_models import architectures, facts_of_names


def main(modules: Sequence[str]) -> None:
    names = architectures()
    chosen = {name for module in modules for name in timm.list_models(module=module)} if modules else set(names)
    if not chosen:
        raise SystemExit(
            f"record_shapes: timm has no models in {', '.join(modules)}. Possible: names such as beit, eva."
        )
    known = facts_of_names(name for name in names if name in chosen)
    tagged = timm.list_pretrained()
    tags = [name for name in tagged if name.partition(".")[0] in known]
    found = kept(chosen) | known | facts_of_names(tags)
    order = {name: place for place, name in enumerate([*names, *tagged])}
    ship({name: found[name] for name in sorted(found, key=order.__getitem__)})
    count = sum("." not in name for name in found)
    print(f"{count} models and {len(found) - count} tags of timm {timm.__version__} -> {SHIPPED}")


def kept(chosen: set[str]) -> dict[str, Facts]:
    """What the file has of models that are not recorded now."""
    facts = {name: find(ModelConfig(name)) for name in shipped() if name.partition(".")[0] not in chosen}
    return {name: one for name, one in facts.items() if one is not None}


if __name__ == "__main__":
    main(sys.argv[1:])
