"""Memory and time of a run on a cluster, before it starts."""
