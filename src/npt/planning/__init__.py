"""Before a run: its memory, its time and how it spreads over processes, from the model's shapes alone."""
