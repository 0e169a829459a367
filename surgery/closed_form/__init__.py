"""The mathematics, with torch alone: statistics in, least-squares optimal polynomials out.

Moments of a block's inputs and hidden units come in, from data or a Gaussian mixture; what goes out is the polynomial
of every unit, a readout re-solved by ridge regression, and the block's polynomial as one type, with its bilinear form.
"""
