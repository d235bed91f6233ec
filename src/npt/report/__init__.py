"""A run as a person reads it: plots, one HTML page, tables and a live view in the terminal, and figures for trackers.

All of it reads the files that a run writes (`run_files`), so it works on a finished run, a stopped one and a damaged one.
"""
