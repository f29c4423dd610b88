"""The search loop: choose candidates, run them, promote them, recover after kills, and confirm the front."""
