"""Coverage-guided fuzzers of what people hand to npt; see README.md."""
