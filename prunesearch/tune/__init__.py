"""Use of a study in Ray Tune: a trainable, and the import of Tune's results."""

from prunesearch.extras import need

need("Ray Tune", "search", "ray")
