"""Commands that regenerate the figures the README quotes."""
