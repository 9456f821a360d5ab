"""Making of safety vectors and coefficients."""
