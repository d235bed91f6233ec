"""Tests of npt.finetuning."""
