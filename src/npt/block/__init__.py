"""One NPT block: its equation, the hooks that apply it, and where each model family keeps the modules they sit on."""
