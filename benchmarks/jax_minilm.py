"""MiniLM in JAX with the same weights, and its kernel by neural-tangents 0.6.5. Runs in an environment of its own.

    python -m venv jaxenv && jaxenv/bin/pip install neural-tangents==0.6.5 jax==0.4.26 jaxlib==0.4.26 "numpy<2" "scipy<1.13"

Called by ``ntk.py --jax-python jaxenv/bin/python``: ``jax_minilm.py WEIGHTS.npz OUT.npy``, where WEIGHTS holds the tensors of
the read-out by name and the token ids (n, T), all of one length.
"""

import json
import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"

import jax
import jax.numpy as jnp
import neural_tangents as nt
import numpy as np

HEADS = 12


def layer_norm(p, name, x):
    """Normalise over the last axis."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-12) * p[name + ".weight"] + p[name + ".bias"]


def dense(p, name, x):
    """Apply a torch linear layer."""
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def score(p, ids):
    """Return f(x) of texts of one length: (n, T) -> (n, 1)."""
    e = "model.embeddings."
    x = p[e + "word_embeddings.weight"][ids] + p[e + "position_embeddings.weight"][: ids.shape[1]]
    x = layer_norm(p, e + "LayerNorm", x + p[e + "token_type_embeddings.weight"][0])
    n, t, d = x.shape
    layer = 0
    while f"model.encoder.layer.{layer}.output.dense.weight" in p:
        b = f"model.encoder.layer.{layer}."
        q, k, v = (
            dense(p, b + f"attention.self.{w}", x).reshape(n, t, HEADS, d // HEADS).transpose(0, 2, 1, 3)
            for w in ("query", "key", "value")
        )
        weights = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / (d // HEADS) ** 0.5, -1)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(n, t, d)
        x = layer_norm(p, b + "attention.output.LayerNorm", x + dense(p, b + "attention.output.dense", mixed))
        inner = jax.nn.gelu(dense(p, b + "intermediate.dense", x), approximate=False)
        x = layer_norm(p, b + "output.LayerNorm", x + dense(p, b + "output.dense", inner))
        layer += 1
    return x.mean(1) @ p["head.weight"].T / d**0.5


def working(ids, parameters):
    """Return the first implementation that runs on two texts, and what stopped the ones before it."""
    failed = {}
    for name in ("STRUCTURED_DERIVATIVES", "JACOBIAN_CONTRACTION"):
        implementation = getattr(nt.NtkImplementation, name)
        kernel = jax.jit(nt.empirical_ntk_fn(score, trace_axes=(), vmap_axes=0, implementation=implementation))
        try:
            kernel(ids[:2], None, parameters)
            return kernel, name, failed
        except Exception as error:  # whatever it is, it is reported
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    raise SystemExit(json.dumps(failed))


def main():
    """Compute the kernel twice, the first time with compilation; print seconds as JSON."""
    data = dict(np.load(sys.argv[1]))
    ids = jnp.asarray(data.pop("ids"))
    parameters = {k: jnp.asarray(v) for k, v in data.items()}
    kernel, name, failed = working(ids, parameters)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        matrix = np.asarray(kernel(ids, None, parameters))
        seconds.append(time.perf_counter() - started)
    n = len(ids)
    np.save(sys.argv[2], matrix.reshape(n, n).astype(np.float64))
    with open("/proc/self/status") as status:
        peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    result = {"seconds": seconds[1], "with_compilation": seconds[0], "peak_bytes": peak}
    print(json.dumps(result | {"implementation": name, "implementations_that_failed": failed}))


if __name__ == "__main__":
    main()
