"""Quantum noise on rows of probabilities: channels in closed form and on density matrices (docs/noise.md)."""
