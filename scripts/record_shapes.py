"""Record the shapes of timm's models that a schedule can be applied to, in prunesearch/evaluate/timm_shapes.json.

    PYTHONPATH=. python scripts/record_shapes.py

Run it after an upgrade of timm and after a change of the shape classes. It builds each model without weights, and once
more for each tag of pretrained weights, because a tag may have another image size or number of classes. It takes a few
minutes.
"""

from __future__ import annotations

import timm

from prunesearch.evaluate.shape_cache import SHIPPED, ship
from prunesearch.evaluate.timm_models import architectures, facts_of_names


def main() -> None:
    known = facts_of_names(architectures())
    tagged = [name for name in timm.list_pretrained() if name.partition(".")[0] in known]
    facts = known | facts_of_names(tagged)
    ship(facts)
    print(f"{len(known)} models and {len(facts) - len(known)} tags of timm {timm.__version__} -> {SHIPPED}")


if __name__ == "__main__":
    main()
