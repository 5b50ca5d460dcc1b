"""One file per technique: its configuration with presets, its arms, its claims. Here techniques and the lab meet."""
