"""The doorway to Ray Tune."""
