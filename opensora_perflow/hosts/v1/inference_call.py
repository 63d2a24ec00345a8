"""What an Open-Sora inference script is about to sample: its networks, prompts and sizes, built by the script itself.

The script runs as it is, with its own command line, up to its first call of `scheduler.sample`; there it is stopped. So the
checkpoint, the text encoder, the text cleaning and the video's sizes are the host's, whatever the tag.
"""

import runpy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from opensora_perflow.hosts.script import loaded_weights


@dataclass(frozen=True)
class InferenceCall:
    """The arguments of the script's scheduler.sample, and the config that its scheduler was built from."""

    scheduler: Mapping[str, Any]
    model: nn.Module
    text_encoder: Any
    z: Tensor
    prompts: Sequence[str]
    device: torch.device | str
    additional_args: Mapping[str, Any] = field(default_factory=dict)
    neg_prompts: Sequence[str] | None = None
    weights: str | None = None
    """Where the script's network got its weights."""


class _Stop(BaseException):
    """Carries the call out of the script; a BaseException, so that no `except Exception` of the host holds it."""

    def __init__(self, call: InferenceCall) -> None:
        self.call = call


class _Recorder:
    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)

    def sample(
        self,
        model: nn.Module,
        text_encoder: Any,
        z: Tensor | None = None,
        prompts: Sequence[str] = (),
        device: Any = "cpu",
        additional_args: Mapping[str, Any] | None = None,
        mask: Tensor | None = None,
        *_: Any,
        **named: Any,
    ):
        if z is None:
            raise ValueError(
                "plans are made for rectified flows, those of Open-Sora 1.2 and 1.3; this script samples another model"
            )
        if named.get("mask_index") or (mask is not None and bool((mask != 1).any())):
            raise ValueError("a plan is made for text to video; leave out references (--reference-path, --cond-type)")
        given = dict(additional_args or {})
        call = InferenceCall(self._config, model, text_encoder, z, list(prompts), device, given)
        raise _Stop(replace(call, neg_prompts=named.get("neg_prompts"), weights=loaded_weights()))


def first_call(script: str, arguments: Sequence[str]) -> InferenceCall:
    """Run an inference script until it samples.

    Args:
        script: Of a checkout that run.prepare has made importable.
        arguments: The script's own command line.

    Raises:
        ValueError: the script ended without sampling, or wants reference frames.
        SystemExit: the script's own, for wrong arguments.
    """
    from opensora.registry import SCHEDULERS

    SCHEDULERS.build = lambda config, *args, **kwargs: _Recorder(config)  # on the object: `del` brings the class's back
    argv, sys.argv = sys.argv, [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except _Stop as stop:
        return stop.call
    finally:
        sys.argv = argv
        del SCHEDULERS.build
    raise ValueError(f"{script} ended without sampling; name an inference script, such as ROOT/scripts/inference.py")
