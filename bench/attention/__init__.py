"""Attention on the CPU, measured: speed, error, and both together, against whatever else computes attention here."""
