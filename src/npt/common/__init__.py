"""What every package uses and what knows nothing of NPT: files, display, precision, progress, processes, digests."""
