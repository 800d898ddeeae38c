"""Matrices as matrix product states and operators: docs/mps.md."""
