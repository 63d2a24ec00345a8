"""What Open-Sora's own loaders make of a file of weights: which keys it may lack, and which of them a network computes.

The host loads with strict=False (opensora/utils/ckpt_utils.py of every 1.x tag) and goes on with whatever was missing. Here
every difference that is meant has a name, and any other is left for the caller to refuse.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_perflow.checkpoints import read_state_dict, refuse_missing
from opensora_perflow.hosts.script import model_settings
from opensora_perflow.training.adapters import is_added
from opensora_perflow.worlds.model import WEIGHTS

logger = logging.getLogger("opensora_perflow")

SHIPPED = {"perflow_tiny_teacher": WEIGHTS}
"""Names of weights that come with the package, for configs, which cannot know where it is."""
TABLES = ("pos_embed", "pos_embed_temporal")
"""STDiT computes them from its video size. The host throws a file's away (v1.1.0 ckpt_utils.py:67-71), and published weights of
1.0 have none."""
FREQUENCIES = "rope.freqs"
"""STDiT2 and STDiT3 compute them too, and the host takes a file's where it has some."""
ZERO_AT_FIRST = tuple(
    f"{name}.proj.{kind}" for name in ("x_embedder_cond", "x_embedder_cond_mask") for kind in ("weight", "bias")
)
"""1.3's embedders of reference frames (v1.3 opensora/models/stdit/stdit3.py:378-381), which weights of 1.2 lack."""
NULL_TEXT = "y_embedder.y_embedding"
"""[L, D]; the host cuts it to the text encoder's length, or repeats its last row (v1.1.0 ckpt_utils.py:73-86)."""


def read_weights(source: str | os.PathLike, network: nn.Module) -> dict[str, Tensor]:
    """The weights that the host's own loader would give a network from a source.

    Args:
        source: As `read_state_dict` takes it, one of SHIPPED, or one of the host's names of published weights that it has
            fetched.
        network: The bare network. Only what it computes is taken from it.

    Raises:
        ValueError: the source holds adapters alone.
        ValueError, OSError: see `read_state_dict`.
    """
    state = read_source(source)
    if any(is_added(name) for name in state):
        raise ValueError(
            f"{str(source)!r} holds adapters (LoRA) alone, and a whole network is wanted; merge them into their base first: "
            "opensora-perflow merge CHECKPOINT OUT --base WEIGHTS"
        )
    return as_loaded(_with_16_channels(state) if model_settings().get("adapt_16ch") else state, network)


def read_source(source: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a source, see `read_weights`, as they are."""
    return read_state_dict(_place(source))


def check_there(source: str | os.PathLike) -> None:
    """Raises ValueError for a path where nothing is. Names without a folder pass: the host may fetch them yet."""
    if Path(source).name != str(source):
        refuse_missing(_place(source))


def _place(source: str | os.PathLike) -> str | os.PathLike:
    """A source, or where weights lie that go by its name."""
    fetched = Path("pretrained_models") / source  # v1.1.0 ckpt_utils.py:104
    if Path(source).exists():
        return source
    return fetched if fetched.is_file() else SHIPPED.get(str(source), source)


def as_loaded(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """A state dict with what its network computes, and with what starts at zero where a file is older than that."""
    state, own = dict(state), network.state_dict()
    learned = {name for name, _ in network.named_parameters()}
    for name in TABLES:
        if name not in learned:
            state.pop(name, None)
            if name in own:
                state[name] = own[name].detach().cpu()
    if FREQUENCIES in own:
        state.setdefault(FREQUENCIES, own[FREQUENCIES].detach().cpu())
    if not any(name in state for name in ZERO_AT_FIRST):
        # Zeros, and not what the network has: a student that is resumed has trained them.
        state.update({name: torch.zeros_like(own[name], device="cpu") for name in ZERO_AT_FIRST if name in own})
    if NULL_TEXT in own and NULL_TEXT in state:
        state[NULL_TEXT] = _of_length(state[NULL_TEXT], own[NULL_TEXT])
    return state


def matched(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in the form of another one of the same network: with what that has computed, with what starts at zero.

    Differences that no loader of the host minds, see `as_loaded`, are gone; any other is left for the caller to refuse.
    """
    state = {name: value for name, value in state.items() if name not in TABLES and (name != FREQUENCIES or name in like)}
    state |= {name: like[name] for name in TABLES if name in like}
    if FREQUENCIES in like:
        state.setdefault(FREQUENCIES, like[FREQUENCIES])
    if not any(name in state for name in ZERO_AT_FIRST):
        state |= {name: torch.zeros_like(like[name]) for name in ZERO_AT_FIRST if name in like}
    if NULL_TEXT in state and NULL_TEXT in like:
        state[NULL_TEXT] = _of_length(state[NULL_TEXT], like[NULL_TEXT])
    return state


def _of_length(null: Tensor, like: Tensor) -> Tensor:
    if null.dim() != 2 or null.shape[1:] != like.shape[1:] or len(null) in (0, len(like)):
        return null
    logger.info("the null text of the weights has %d tokens, the network's %d: fitted as Open-Sora does", len(null), len(like))
    return torch.cat([null, null[-1:].expand(max(0, len(like) - len(null)), -1)])[: len(like)].clone()


def _with_16_channels(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for 4 latent channels, for 16: model.adapt_16ch, as v1.3's loader does it (ckpt_utils.py:199-213).

    For patches of 1 x 2 x 2 and outputs of twice the channels. Weights of 16 channels stay as they are.
    """
    state, name, last = dict(state), "x_embedder.proj.weight", "final_layer.linear"
    if name in state and state[name].dim() == 5 and state[name].shape[1] == 4 and len(state.get(f"{last}.bias", ())) == 32:
        state[name] = state[name].repeat(1, 4, 1, 1, 1) / 4
        weight, bias = state[f"{last}.weight"], state[f"{last}.bias"]
        state[f"{last}.weight"] = weight.reshape(4, 2, 4, -1).repeat(1, 1, 4, 1).reshape(128, -1)
        state[f"{last}.bias"] = bias.reshape(4, 2, 4).repeat(1, 1, 4).reshape(128)
    return state
