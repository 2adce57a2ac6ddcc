"""The model and the loss of a Trainer's run, as the kernel sees them: `sequence_readout` and `centred_mse_loss`.

Source: the book's page "Stopping on your own data".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ntkft.errors import InputError
from ntkft.models import LoadedModel
from ntkft.readout import MAX_TOKENS, Readout

__all__ = ["centred_mse_loss", "sequence_readout"]


class _LogitModule(nn.Module):
    """The one logit of a sequence classifier, (n,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)  # (n,)


def sequence_readout(model: Any, tokenizer: Any, *, max_tokens: int = MAX_TOKENS) -> Readout:
    """Read a sequence classifier with one label as a scalar function: the one that a Trainer fits with its squared loss.

    Parameters
    ----------
    model : transformers model, PEFT or not
        With ``num_labels=1``. It is put into evaluation mode; a Trainer puts it back.
    tokenizer : its tokenizer
        Texts are cut to `max_tokens` tokens: cut those of the Trainer in the same way.

    Raises
    ------
    InputError
        If the model has not one label.

    Example
    -------
    >>> model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=1)          # doctest: +SKIP
    >>> kernel = ntkft.empirical_ntk(sequence_readout(model, tokenizer), task.texts)            # doctest: +SKIP
    """
    config = getattr(model, "config", None)
    labels = getattr(config, "num_labels", None)
    if labels != 1:
        raise InputError(f"The model has num_labels={labels} and a squared loss needs one number: load it with num_labels=1.")

    def encode(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=max_tokens)["input_ids"]

    name = getattr(config, "name_or_path", "") or type(model).__name__
    about = {"name": name, "kind": "sequence classifier", "architecture": type(model).__name__}
    loaded = LoadedModel(model.eval(), tokenizer, about)
    return Readout(_LogitModule(model), loaded, encode, {"readout": "sequence classifier", "max_tokens": max_tokens})


def centred_mse_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the squared loss with a free constant in each batch, a Trainer's ``compute_loss_func``.

    The constant direction of the kernel, often by far its largest eigenvalue, then no longer limits the step. The constant
    itself is fitted after training: add mean(y - f) over the training texts to the predictions. Accumulated batches are
    summed, as ``accumulated="auto"`` assumes.

    Example
    -------
    >>> import torch
    >>> from types import SimpleNamespace
    >>> outputs = SimpleNamespace(logits=torch.tensor([[1.0], [2.0]]))
    >>> centred_mse_loss(outputs, torch.tensor([6.0, 7.0]))       # off by a constant only
    tensor(0.)
    """
    left = outputs.logits.squeeze(-1) - labels.to(outputs.logits)
    return ((left - left.mean()) ** 2).mean()
