"""Attention of queries that each read a range of sorted keys; Triton only, under other operations."""
