"""Ranks, durable files, logging, signals and hardware facts: what every long-running part needs."""
