"""Bridges to tools that need more than a PEFT model."""
