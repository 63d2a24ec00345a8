"""The kinds of value that only the host's keys have, see checks.py."""

from collections.abc import Mapping
from typing import Any

from opensora_perflow.checks import MOST_STEPS, choice, number, plain, shown, whole

ONLY_FALSE = {
    "use_kl": "the student's loss is chosen by `objective`",
    "rescale_learned_sigmas": "the variance is kept as the teacher's by a loss of its own (learn_sigma=True)",
    "sigma_small": "the sampler takes deterministic steps, so the size of random ones means nothing; leave it out",
    "predict_xstart": "teacher and student predict noise (`prediction`); networks that predict clean data are not supported",
}
CONDITIONS = ("null", "cond", "text", "keep")


def weights(name: str, value: Any) -> dict[str, float]:
    """What drop_condition holds."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a dict or None, got {shown(value)}; write for example dict(keep=0.9, text=0.1)")
    one = number(low=0)
    weights = {choice(*CONDITIONS)(f"a key of {name}", k): one(f"{name}[{shown(k)}]", weight) for k, weight in value.items()}
    if not sum(weights.values()) > 0:
        raise ValueError(f"{name} needs a positive weight, got {weights}")
    return weights


def channels(name: str, value: Any) -> int | str | None:
    """What cfg_channel holds."""
    value = plain(value)
    if value is None or (isinstance(value, str) and value == "auto"):
        return value
    return whole()(f"{name} (or None for all channels)", value)


def respacing(name: str, value: Any) -> int | str | None:
    """What timestep_respacing holds: a number of steps, which may be text; "" and None leave it to num_sampling_steps."""
    value = plain(value)
    if value is None or (isinstance(value, str) and value == ""):
        return value
    if isinstance(value, str) and not (value.isdecimal() and len(value) < 10):
        raise ValueError(
            f"{name}={shown(value)} divides a diffusion into sections, which is what windows do here; write "
            "windows=[1, ..., 0] for where steps end and num_sampling_steps for how many there are"
        )
    return whole(high=MOST_STEPS)(name, int(value) if isinstance(value, str) else value)


def only_false(name: str, value: Any) -> bool:
    """A switch of iddpm's that has one position here."""
    if plain(value) is not False:
        raise ValueError(f"{name}={shown(value)} is iddpm's, and perflow takes only False: {ONLY_FALSE[name]}")
    return False
