"""Measuring what batching does to answers: walks, thresholds, tables, plots, comparisons."""
