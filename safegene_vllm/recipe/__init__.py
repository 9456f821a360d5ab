"""Where vectors and coefficients come from. Import what you need from the modules."""
