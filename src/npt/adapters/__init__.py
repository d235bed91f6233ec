"""Adapters as files: find, check, load, save, and join those of disjoint blocks."""
