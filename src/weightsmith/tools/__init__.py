"""Jobs on model files: what the command line does with checkpoints, a function per command."""
