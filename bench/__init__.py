"""Benchmarks of qexport on real models and data; bench/README.md lists them. Not part of the installed package."""
