"""Reading a twin: what its polynomials say, in closed form.

expansion       constant, linear and quadratic parts of a block, for any direction of its output
spectrum        eigenpairs of the quadratic part
place           which block of a model, and the norms around it
directions      output directions by name: a token, a neuron, a class, a file, the block's own
texts           what the block sees in text, and which tokens drive a direction
explaining      all of this for one block, as data
page            … as HTML, PNG and JSON
attack          projecting directions out of inputs
approximation   R² of linear, quadratic, … closed forms for any feed-forward block
trace           … of all blocks, through training
"""

from surgery.explain.expansion import BlockPolynomial, Expansion, Quadratic
from surgery.explain.spectrum import Spectrum, spectrum

__all__ = ["BlockPolynomial", "Expansion", "Quadratic", "Spectrum", "spectrum"]
