"""Judging generated clips."""
