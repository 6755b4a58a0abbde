"""Declarations of the ops, by theme."""
