"""One file a family: how its configuration is read, and its names."""
