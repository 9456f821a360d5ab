"""One HTML page about evaluations, and its plots. Import from the modules."""
