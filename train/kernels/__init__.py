"""Sparse select, decode and backward on kept entries only; the dense references stand in the tests."""
