r"""What fine-tuning did to the weights, as one vector: :math:`\tau = \theta_{\text{after}} - \theta_{\text{before}}`.

Such vectors can be added, scaled, compared and applied to a model: *task arithmetic*. On the tangent of a model they are
linear in what they do, because :math:`f(x;\theta_0 + \tau) - f(x;\theta_0) = \langle \nabla f(x;\theta_0), \tau\rangle`
there (`ntkft.tangent`); on the model itself only as far as it stays near its tangent.

The vector lives over the floating-point tensors of a model, weights and saved buffers, under the model's own names. A tied
weight is one tensor and counts once. Tensors are kept in float32 on the CPU unless another type is asked for; differences,
norms and sums are float64, a tensor at a time, so that beside the vector no further copy of a large model is in memory.

Source: Ilharco et al. 2023 (arXiv:2212.04089), the book's chapter "Task vectors".

Example
-------
>>> import torch
>>> before = torch.nn.Linear(2, 1)
>>> after = {"weight": before.weight + 3.0, "bias": before.bias - 4.0}
>>> tau = TaskVector(before, after)
>>> round(tau.norm(), 4), sorted(tau.tensors)
(5.831, ['bias', 'weight'])
>>> round((tau + 2 * tau - tau / 2).cosine(tau), 6)
1.0
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import ntkft
from ntkft.errors import InputError
from ntkft.files import atomic_path
from ntkft.lora import lora_changes
from ntkft.models import LoadedModel
from ntkft.ntk.layout import blocks_by
from ntkft.readout import Readout
from ntkft.weights import Source, both_sides, difference, fingerprint, place, tensors_of, untie

__all__ = ["TaskVector", "common_base", "common_dtype", "linear_combination", "shared_names"]

_KEY = "ntkft_task_vector"  # of the manifest in a file's metadata


class TaskVector:
    r"""The difference of two sets of weights, :math:`\tau = \theta_{\text{after}} - \theta_{\text{before}}`, by name.

    Vectors of one base form a vector space: ``a + b``, ``a - b``, ``2 * a``, ``a / 2``, ``-a`` and ``sum([a, b])``. A name
    that a vector lacks, after `select` or in a LoRA adapter, stands for a zero tensor.

    Parameters
    ----------
    before, after : Readout, LoadedModel, nn.Module, mapping of name to tensor, or path
        The weights. A path is a .safetensors file or a folder as `save_pretrained` writes it.
    dtype : torch.dtype
        Type in which the differences are kept.
    info : dict, optional
        What the vector is, for its file (JSON-serialisable).

    Attributes
    ----------
    tensors : dict of name to tensor
        τ.
    base : str or None
        SHA-256 of the floating-point tensors of `before`; None if vectors of several bases were mixed, or it is not known.
    info : dict

    Raises
    ------
    InputError
        If the two sides do not have the same tensors (the message names the first that differs), an integer buffer
        changed, one side ties weights that the other holds apart, or a source cannot be read.

    Example
    -------
    >>> readout = ntkft.prompt_readout(ntkft.load_model("smollm2"))                      # doctest: +SKIP
    >>> start = {name: p.detach().clone() for name, p in readout.parameters().items()}   # doctest: +SKIP
    >>> train(readout, task.texts, task.y, step_size=1e-3, epochs=2)                     # doctest: +SKIP
    >>> tau = TaskVector(start, readout, info={"task": task.name})                       # doctest: +SKIP
    """

    __array_ufunc__ = None  # so that numpy's numbers leave np.float64(2) * tau to __rmul__

    tensors: dict[str, Tensor]
    base: str | None
    info: dict[str, Any]

    def __init__(
        self, before: Source, after: Source, *, dtype: torch.dtype = torch.float32, info: Mapping[str, Any] | None = None
    ) -> None:
        old, new = both_sides(before, after)
        self.tensors = {name: difference(new[name], old[name]).to(dtype) for name in old}
        self.base = fingerprint(old)
        self.info = dict(info or {})

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, Tensor],
        *,
        base: str | None = None,
        dtype: torch.dtype = torch.float32,
        info: Mapping[str, Any] | None = None,
    ) -> TaskVector:
        """Make a vector of given differences; they are copied.

        Example
        -------
        >>> TaskVector.from_tensors({"w": torch.tensor([3.0, 4.0])}).norm()
        5.0
        """
        vector = cls.__new__(cls)
        vector.tensors = {name: t.detach().to("cpu", dtype, copy=True) for name, t in tensors.items()}
        vector.base, vector.info = base, dict(info or {})
        return vector

    @classmethod
    def from_lora(
        cls,
        adapter: nn.Module | str | Path,
        base: LoadedModel | nn.Module | None = None,
        *,
        adapter_name: str | None = None,
        dtype: torch.dtype = torch.float32,
        info: Mapping[str, Any] | None = None,
    ) -> TaskVector:
        r"""Write out a LoRA adapter: :math:`\Delta W = s\,BA` for each layer, under the names of the model it sits on.

        So the sum of two vectors is the sum of what the adapters do. Adding the factors is something else:
        :math:`(B_1+B_2)(A_1+A_2)` has two cross terms too many. Source: Hu et al. 2022 (arXiv:2106.09685); the scale s is
        α/r, or α/√r with rsLoRA. Trained copies of whole modules (``modules_to_save``), trained biases and the bias of B
        belong to the difference.

        Parameters
        ----------
        adapter : PeftModel, module with LoRA layers, or path
            A path is a folder as `PeftModel.save_pretrained` writes it.
        base : LoadedModel or nn.Module, optional
            The model without the adapter. Needed with a folder, and if biases were trained; it is not changed.
        adapter_name : str, optional
            Which adapter; the active one by default.
        dtype, info
            As for `TaskVector`.

        Raises
        ------
        InputError
            If the adapter is not plain LoRA on linear and embedding layers (DoRA, PiSSA, quantised layers, ...), is merged,
            or changes one use of a tied weight only, which no difference of weights can say.

        Example
        -------
        >>> tau = TaskVector.from_lora("my-adapter", base=load_model("smollm2"))         # doctest: +SKIP
        """
        tensors, found = lora_changes(adapter, base, adapter_name)
        return cls.from_tensors(tensors, base=found, dtype=dtype, info=info)

    def __repr__(self) -> str:
        size = sum(t.numel() for t in self.tensors.values())
        where = "unknown or mixed" if self.base is None else self.base[:12]
        return f"TaskVector({len(self.tensors)} tensors, {size:,} parameters, norm={self.norm():.4g}, base={where})"

    # --- A vector space -------------------------------------------------------------------------------------------

    def __add__(self, other: TaskVector) -> TaskVector:
        return linear_combination([self, other], [1.0, 1.0]) if isinstance(other, TaskVector) else NotImplemented

    def __radd__(self, other: int) -> TaskVector:
        # sum() starts from the number 0.
        return 1.0 * self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: TaskVector) -> TaskVector:
        return linear_combination([self, other], [1.0, -1.0]) if isinstance(other, TaskVector) else NotImplemented

    def __mul__(self, scale: float) -> TaskVector:
        if not isinstance(scale, Real):
            return NotImplemented
        return self._with(lambda t: (t.double() * _finite(scale)).to(t.dtype))

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> TaskVector:
        if not isinstance(scale, Real):
            return NotImplemented
        if scale == 0:
            raise InputError("A task vector was divided by 0: divide by a number that is not zero.")
        return self._with(lambda t: (t.double() / _finite(scale)).to(t.dtype))

    def __neg__(self) -> TaskVector:
        return self._with(torch.neg)

    def _with(self, change: Callable[[Tensor], Tensor], names: Sequence[str] | None = None) -> TaskVector:
        """Change each tensor, or each of `names` and drop the others; the base and a copy of info stay."""
        kept = self.tensors if names is None else names
        vector = type(self).__new__(type(self))
        vector.tensors = {name: change(self.tensors[name]) for name in kept}
        vector.base, vector.info = self.base, dict(self.info)
        return vector

    def dot(self, other: TaskVector) -> float:
        """Return ⟨τ, τ'⟩ over all tensors."""
        shared_names([self, other])
        return sum((_dot(t, other.tensors[name]) for name, t in self.tensors.items() if name in other.tensors), 0.0)

    def norm(self) -> float:
        """Return the Euclidean norm ‖τ‖ over all tensors."""
        return math.sqrt(sum(_dot(t, t) for t in self.tensors.values()))

    def cosine(self, other: TaskVector) -> float:
        """Return the cosine of the angle between two vectors; `InputError` if one of them is zero."""
        sizes = self.norm(), other.norm()
        if 0 in sizes:
            raise InputError(f"The two task vectors have the norms {sizes[0]:.4g} and {sizes[1]:.4g}: zero has no direction.")
        return self.dot(other) / (sizes[0] * sizes[1])

    def per_layer(self, other: TaskVector | None = None) -> dict[str, float]:
        """Return the norm of each layer's part or, with `other`, the cosine between the two vectors' parts.

        Layers are those of ``empirical_ntk(blocks="layer")``: "embedding", "layer 0", and so on. The cosine is nan where
        one of the two parts is zero.

        Example
        -------
        >>> tau = TaskVector.from_tensors({"h.0.weight": torch.ones(4), "h.1.weight": torch.ones(9)})
        >>> tau.per_layer()
        {'layer 0': 2.0, 'layer 1': 3.0}
        """
        names = list(self.tensors) if other is None else shared_names([self, other])
        label = blocks_by(names, "layer")
        parts: dict[str, list[str]] = {}
        for name in names:
            parts.setdefault(label(name), []).append(name)

        def part(vector: TaskVector, members: list[str]) -> TaskVector:
            return vector._with(lambda t: t, [name for name in members if name in vector.tensors])

        norms = {k: part(self, v).norm() for k, v in parts.items()}
        if other is None:
            return norms
        cosines = {}
        for k, v in parts.items():
            size = norms[k] * part(other, v).norm()
            cosines[k] = part(self, v).dot(part(other, v)) / size if size > 0 else math.nan
        return cosines

    def select(self, patterns: str | Sequence[str]) -> TaskVector:
        """Keep the tensors whose names match one of the shell patterns, as ``empirical_ntk(parameters=)`` does.

        Example
        -------
        >>> list(TaskVector.from_tensors({"a.w": torch.ones(1), "b.w": torch.ones(1)}).select("a.*").tensors)
        ['a.w']
        """
        wants = [patterns] if isinstance(patterns, str) else list(patterns)
        names = list(self.tensors)
        for pattern in wants:
            if not fnmatch.filter(names, pattern):
                some = f" ({names[0]}, ..., {names[-1]})" if names else ""
                raise InputError(f"The pattern {pattern!r} matches none of the vector's {len(names)} tensors{some}.")
        return self._with(torch.clone, [name for name in names if any(fnmatch.fnmatch(name, p) for p in wants)])

    def low_rank(self, rank: int) -> TaskVector:
        """Replace each matrix by the nearest one of rank at most `rank` (truncated SVD, Eckart-Young); keep what is no matrix.

        Example
        -------
        >>> TaskVector.from_tensors({"w": torch.diag(torch.tensor([3.0, 1.0]))}).low_rank(1).norm()
        3.0
        """
        if rank != int(rank) or rank < 1:
            raise InputError(f"rank is {rank!r} and must be a whole number from 1 on.")

        def truncate(t: Tensor) -> Tensor:
            if t.ndim != 2 or rank >= min(t.shape):
                return t.clone()
            u, s, v = torch.linalg.svd(t.double(), full_matrices=False)
            return (u[:, :rank] * s[:rank] @ v[:rank]).to(t.dtype)

        return self._with(truncate)

    # --- Models ---------------------------------------------------------------------------------------------------

    def apply(self, model: Any, scale: float = 1.0, *, strict: bool = False) -> Any:
        """Add ``scale``·τ to a model's weights in place, and return the model.

        Parameters
        ----------
        model : Readout, LoadedModel, nn.Module or mapping of name to tensor
            A vector of a language model may also be applied to a read-out of it.
        scale : float
            How far to go; negative to unlearn.
        strict : bool
            Refuse a model that is not the vector's base. By default any model with these names and shapes will do, because
            to carry a vector to another model is a legitimate experiment.

        Raises
        ------
        InputError
            If the model lacks a tensor, has it in another shape, or is not the base in spite of `strict`. Nothing is
            changed then.

        Example
        -------
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> tau = TaskVector(layer, {"weight": torch.zeros(1, 1)})
        >>> tau.apply(layer).weight.item()
        0.0
        """
        _add(self._targets(model, strict), _finite(scale))
        return model

    @contextmanager
    def applied(self, model: Any, scale: float = 1.0, *, strict: bool = False) -> Iterator[Any]:
        """Apply the vector within a ``with`` block; at its end every bit of the old weights is back, also after an error.

        The weights are put back from a copy, because adding and subtracting would leave rounding errors.

        Example
        -------
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> tau = TaskVector(layer, {"weight": torch.zeros(1, 1)})
        >>> with tau.applied(layer):
        ...     print(layer.weight.item())
        0.0
        """
        targets = self._targets(model, strict)
        # Only the tensors that change, and buffers too: finetune.preserved_weights copies all weights of a read-out.
        kept = [(t, t.detach().clone()) for t, _ in targets]
        try:
            _add(targets, _finite(scale))
            yield model
        finally:
            with torch.no_grad():
                for t, value in kept:
                    t.copy_(value)

    def _targets(self, model: Any, strict: bool) -> list[tuple[Tensor, Tensor]]:
        """Pair the model's tensors with the vector's, or raise; nothing is changed."""
        if isinstance(model, str | Path):
            raise InputError(f"The model is the path {str(model)!r}, and a file is not changed: load it with load_model first.")
        places = tensors_of(model)
        if isinstance(model, Readout) and not self.tensors.keys() <= places.keys():
            inner = tensors_of(model.model)
            places = inner if self.tensors.keys() <= inner.keys() else places
        taken: dict[tuple, str] = {}
        for name, t in self.tensors.items():
            if name not in places:
                hint = "apply it to the read-out" if name.startswith("model.") else "list(tau.tensors) shows the vector's names"
                raise InputError(f"The task vector has {name} {tuple(t.shape)}, which the model lacks: {hint}.")
            if places[name].shape != t.shape:
                raise InputError(
                    f"{name} has shape {tuple(t.shape)} in the task vector and {tuple(places[name].shape)} in the model: "
                    "a vector fits models of its own architecture."
                )
            twin = taken.setdefault(place(places[name]), name)
            if twin != name:
                raise InputError(f"{twin} and {name} are two tensors of the task vector and one tied weight of the model.")
        if strict and fingerprint(untie(places)[0]) != self.base:
            raise InputError(
                f"The model is not the base of {self!r}: apply the vector to the weights that it was measured from, "
                "or leave out strict."
            )
        return [(places[name], t) for name, t in self.tensors.items()]

    # --- Files ----------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write the vector as a .safetensors file with a manifest: names, shapes, norm, base, version, info.

        Raises
        ------
        InputError
            If the path does not end in .safetensors, or `info` is not JSON.

        Example
        -------
        >>> import tempfile
        >>> tau = TaskVector.from_tensors({"w": torch.ones(4)}, info={"task": "movies"})
        >>> again = TaskVector.load(tau.save(tempfile.mkdtemp() + "/tau.safetensors"))
        >>> again.info, again.norm()
        ({'task': 'movies'}, 2.0)
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            raise InputError(f"The path is {str(path)!r} and a task vector is kept in a file named *.safetensors.")
        manifest = {
            "version": ntkft.__version__,
            "shapes": {name: list(t.shape) for name, t in self.tensors.items()},
            "norm": self.norm(),
            "base": self.base,
            "info": self.info,
        }
        try:
            text = json.dumps(manifest)
        except (TypeError, ValueError) as error:
            raise InputError(f"info cannot be written as JSON ({error}): keep numbers, texts, lists and dicts there.") from None
        with atomic_path(path) as temporary:
            save_file({name: t.contiguous() for name, t in self.tensors.items()}, temporary, {_KEY: text})
        return path

    @classmethod
    def load(cls, path: str | Path) -> TaskVector:
        """Read a file that `save` wrote; `InputError` if it is none, or its tensors are not those of its manifest."""
        try:
            with safe_open(path, "pt") as file:
                text = (file.metadata() or {}).get(_KEY)
                if text is None:
                    raise InputError(f"{str(path)!r} holds tensors but no task vector: TaskVector(before, after) makes one.")
                manifest = json.loads(text)
                # The file's own order is alphabetic; the manifest has the model's.
                missing = set(manifest["shapes"]) ^ set(file.keys())
                tensors = {} if missing else {name: file.get_tensor(name).clone() for name in manifest["shapes"]}
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise InputError(f"{str(path)!r} cannot be read as a task vector ({error}): give a file that save wrote.") from None
        vector = cls.__new__(cls)
        vector.tensors, vector.base, vector.info = tensors, manifest["base"], manifest["info"]
        shapes = {name: list(t.shape) for name, t in tensors.items()}
        if shapes != manifest["shapes"] or not math.isclose(vector.norm(), manifest["norm"], rel_tol=1e-9):
            raise InputError(f"The tensors in {str(path)!r} are not those of its manifest: the file was changed, save it anew.")
        return vector


def shared_names(vectors: Sequence[TaskVector]) -> list[str]:
    """Return the names of all the vectors' tensors, after a check that the vectors live in one space.

    Shapes must agree. Names must agree too, unless all have the same base: then a missing tensor is a zero.

    Raises
    ------
    InputError
        With the first name that differs, and where.

    Example
    -------
    >>> a, b = (TaskVector.from_tensors({name: torch.ones(2)}, base="one") for name in "ab")
    >>> shared_names([a, b])
    ['a', 'b']
    """
    shapes: dict[str, torch.Size] = {}
    for vector in vectors:
        for name, t in vector.tensors.items():
            if shapes.setdefault(name, t.shape) != t.shape:
                raise InputError(
                    f"{name} has shape {tuple(shapes[name])} in one task vector and {tuple(t.shape)} in another: "
                    "vectors of one architecture can be combined."
                )
    if vectors[0].base is None or any(vector.base != vectors[0].base for vector in vectors):
        for name in shapes:
            for i, vector in enumerate(vectors):
                if name not in vector.tensors:
                    raise InputError(
                        f"{name} is missing in task vector {i} of {len(vectors)}, and the vectors have different bases: "
                        "select the names that they share."
                    )
    return list(shapes)


def linear_combination(vectors: Sequence[TaskVector], weights: Sequence[float]) -> TaskVector:
    """Return Σ_k w_k τ_k, each tensor summed in float64; the base stays if all vectors have the same.

    Raises
    ------
    InputError
        If the vectors do not live in one space (`shared_names`).

    Example
    -------
    >>> a = TaskVector.from_tensors({"w": torch.ones(2)})
    >>> linear_combination([a, a, a], [1, -2, 4]).tensors["w"].tolist()
    [3.0, 3.0]
    """
    vector = TaskVector.from_tensors({})
    for name in shared_names(vectors):
        parts = [(w, v.tensors[name]) for w, v in zip(weights, vectors, strict=True) if name in v.tensors]
        total = sum((w * t.double() for w, t in parts), torch.zeros(parts[0][1].shape, dtype=torch.float64))
        vector.tensors[name] = total.to(common_dtype([t for _, t in parts]))
    vector.base = common_base(vectors)
    return vector


def common_base(vectors: Sequence[TaskVector]) -> str | None:
    """Return the base that all vectors share, or None."""
    bases = {vector.base for vector in vectors}
    return bases.pop() if len(bases) == 1 else None


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the narrowest type that holds all of the tensors."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.double().flatten(), b.double().flatten()))


def _finite(scale: float) -> float:
    if not math.isfinite(scale):
        raise InputError(f"The scale is {scale} and must be a finite number.")
    return float(scale)


def _add(targets: Sequence[tuple[Tensor, Tensor]], scale: float) -> None:
    with torch.no_grad():
        for place, t in targets:
            # In float64 and rounded once: in the model's own precision a small step would be rounded twice.
            place.copy_(place.double() + scale * t.to(place.device).double())
