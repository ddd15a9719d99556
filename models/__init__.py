"""Torch modules and metrics. No IO; of the rest of the system they know the spec only."""
