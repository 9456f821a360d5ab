"""HTML report about evaluations, and its plots."""
