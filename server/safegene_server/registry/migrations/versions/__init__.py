"""One module per step of the schema; each is final once it was released."""
