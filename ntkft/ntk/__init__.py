r"""The exact empirical neural tangent kernel of a language model.

Claim: for a read-out :math:`f(x;\theta)` and texts :math:`x_1, \dots, x_n`,

.. math:: k(x_i, x_j) = \langle \nabla_\theta f(x_i;\theta), \nabla_\theta f(x_j;\theta) \rangle

over *all* trainable parameters, without ever holding the n gradients of length P. It comes in three
steps, one file each:

1. `capture`: one forward and one backward pass per batch give, for each layer, what it saw (a) and what came
   back (g). Each per-text gradient is a sum of outer products of the two (Goodfellow 2015, arXiv:1510.01799).
2. `contract`: two ways from these factors to the inner products; the cheaper one is taken layer by layer.
3. `kernel`: the sum over layers, as a `Kernel` that can be saved, loaded and decomposed.

Source: Jacot, Gabriel & Hongler 2018 for the kernel; the book's chapter "Gradient descent is a filter" for its use.

Example
-------
>>> import ntkft
>>> readout = ntkft.pooled_readout(ntkft.load_model("minilm"))                     # doctest: +SKIP
>>> kernel = ntkft.empirical_ntk(readout, ["Good.", "Bad.", "A long story."])      # doctest: +SKIP
>>> kernel.matrix.shape                                                            # doctest: +SKIP
(3, 3)
"""

from ntkft.ntk.engine import empirical_ntk, ntk_diagonal
from ntkft.ntk.kernel import Kernel
from ntkft.ntk.plan import Plan

__all__ = ["Kernel", "Plan", "empirical_ntk", "ntk_diagonal"]
