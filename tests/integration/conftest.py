"""Import our Ray module first: it sets environment variables that Ray reads when it is imported."""

import prunesearch.workers.ray_pool  # noqa: F401
