"""What the pass shard does to a module, one way of dividing a file."""
