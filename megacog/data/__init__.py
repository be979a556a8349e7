"""Pretokenized clips: shards on disk, frame rates, sample order, batches."""
