"""Code that every package uses: files, display, precision, progress, processes, digests, and the options' names."""
