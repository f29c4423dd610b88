"""Ray reads some settings when it is imported: ours come first, whichever test module is collected first."""

import prunesearch.workers.ray_pool  # noqa: F401
