"""A twin in, what its polynomials say out: directions, eigenpairs and tokens of a block, and R² through training."""
