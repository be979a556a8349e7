"""Is this machine, or are these nodes, fit to train? One function per check."""
