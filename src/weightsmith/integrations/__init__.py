"""Where the training loops of other libraries meet ours: thin adapters."""
