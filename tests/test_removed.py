"""Options that left: each is refused with the sentence that says why, and what does its work now."""

import pytest

from opensora_perflow import PeRFlow
from opensora_perflow.training.removed import REMOVED_KEYS, REMOVED_VALUES

SENTENCES = {**REMOVED_KEYS, **{f"{key}={value!r}": text for (key, value), text in REMOVED_VALUES.items()}}


def nested(dotted, value):
    """draws.starts -> dict(draws=dict(starts=value))."""
    for key in reversed(dotted.split(".")):
        value = {key: value}
    return value


def refusal(settings):
    with pytest.raises(ValueError) as caught:
        PeRFlow(**settings)
    return str(caught.value)


@pytest.mark.parametrize("key", REMOVED_KEYS)
def test_a_removed_key_is_refused_with_its_reason(key):
    settings = nested(key, 1)
    if "curriculum" in settings:
        settings["windows"] = 8  # of its first stage
    assert refusal(settings) == f"{key} was an option and is none any more: {REMOVED_KEYS[key]}"


@pytest.mark.parametrize("key, value", REMOVED_VALUES)
def test_a_removed_value_is_refused_with_its_reason(key, value):
    expected = f"{key}={value!r} was an option and is none any more: {REMOVED_VALUES[key, value]}"
    assert refusal(nested(key, value)) == expected
    if key == "objective":
        assert refusal(dict(objective=["perflow", dict(type=value, weight=0.1)])) == expected


def test_what_stays_is_not_refused():
    PeRFlow(teacher=dict(solver="euler"), draws=dict(starts="diffused"), objective=["perflow", "perflow_phased"])
    assert "unknown key(s) 'beta' in guidance" in refusal(dict(guidance=dict(beta=1)))  # draws.beta is what left


@pytest.mark.parametrize("name", SENTENCES)
def test_a_reason_is_one_line(name):
    """It follows a colon, and says what does the option's work now."""
    text = SENTENCES[name]
    assert text and text == text.strip() and "\n" not in text
