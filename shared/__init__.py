"""The contract between the two stages: the store, sources, models, hooks, configuration and errors."""
