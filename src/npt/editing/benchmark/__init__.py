"""Benchmarks of editing."""
