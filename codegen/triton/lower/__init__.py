"""A phase of a program as a list of kernel launches over one arena: `lower_phase`."""
