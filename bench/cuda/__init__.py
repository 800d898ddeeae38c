"""The ops on an NVIDIA GPU: `python -m bench.cuda`."""
