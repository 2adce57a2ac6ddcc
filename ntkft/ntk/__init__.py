r"""The exact empirical neural tangent kernel of a language model. Start here.

**What.** For a read-out :math:`f(x;\theta)` and texts :math:`x_1, \dots, x_n`,

.. math:: k(x_i, x_j) = \langle \nabla_\theta f(x_i;\theta), \nabla_\theta f(x_j;\theta) \rangle
          = \sum_{\text{layers}} \langle G_i, G_j \rangle

over *all* trainable parameters. The n gradients of length P would fill a disk; the kernel is n by n.

**How.** A linear layer :math:`z = W a` at the tokens t of text i has the gradient :math:`G_i = \sum_t a_{it} \otimes g_{it}`:
what it saw (a) and what came back (g = ∂f/∂z). One forward and one backward pass of a batch give all a and g, and then

.. math:: \langle G_i, G_j \rangle = \sum_{s,t} \langle a_{is}, a_{jt} \rangle \langle g_{is}, g_{jt} \rangle .

The right side ("ghost") never forms a gradient and wins for short texts; forming :math:`G_i`, a block at a time ("explicit"),
wins for long ones. Embeddings are the case of a one-hot a; norms and biases are short, so their gradients are written out.

**Where.** One idea a file, in this order:

1. `factors`: the three shapes in which a gradient comes;
2. `capture`: one forward and backward pass with hooks gives the factors of every parameter;
3. `layout`: which parameters are multiplied together, and the blocks a kernel is split into;
4. `contract`: the two ways, and which is cheaper for which pair of texts;
5. `precision`: products in 32 bits, or in 16 with a measured error;
6. `plan`, `measure`: what it will take, before it is computed; `store`: memory, disk, crashes;
7. `engine`: all of it together, `empirical_ntk`; `oracle`: plain autograd, which checks every run; `kernel`: the result.

Sources: Jacot, Gabriel & Hongler 2018 for the kernel; Goodfellow 2015 (arXiv:1510.01799) for the factors; the book's page
"Computing the kernel" for proofs, pictures and measurements.

Example
-------
>>> import numpy as np, ntkft
>>> from ntkft.ntk.oracle import loop_ntk
>>> readout = ntkft.pooled_readout(ntkft.load_model("minilm"))
>>> texts = ["Good.", "Bad.", "A long story, well told."]
>>> kernel = ntkft.empirical_ntk(readout, texts, blocks="kind", progress=False)
>>> kernel.matrix.shape, round(sum(part.trace() for part in kernel.parts.values()) / kernel.matrix.trace(), 6)
((3, 3), np.float64(1.0))
>>> bool(np.allclose(kernel.matrix, loop_ntk(readout, texts), rtol=1e-4))
True
"""

from ntkft.ntk.engine import empirical_ntk, ntk_diagonal
from ntkft.ntk.kernel import Kernel
from ntkft.ntk.plan import Plan

__all__ = ["Kernel", "Plan", "empirical_ntk", "ntk_diagonal"]
