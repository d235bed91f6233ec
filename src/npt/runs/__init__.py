"""Whole runs, from a configuration to the files they leave."""
