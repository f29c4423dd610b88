"""Searches replayed on recorded tables."""
