"""Commands that regenerate the figures of README.md and docs/."""
