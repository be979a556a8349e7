"""The record of a run: metrics.jsonl, TensorBoard, throughput."""
