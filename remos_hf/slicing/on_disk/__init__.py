"""Slice a checkpoint on disk: weights are read one at a time and written shard by shard."""
