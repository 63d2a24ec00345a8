"""The small decoder without a host: what it refuses. tests/host/test_small_decoder.py decodes by it."""

import pytest
from torch import nn

from opensora_perflow.hosts.v1.small_decoder import perflow_small_decoder, with_small_decoder


def test_a_vae_without_a_kl_autoencoder_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has none"):
        with_small_decoder(nn.Linear(1, 1), nn.Identity())


@pytest.mark.parametrize("settings", [{}, {"base": {"type": "OpenSoraVAE_V1_2"}}, {"base": {}, "decoder": "x"}])
def test_a_base_and_a_decoder_are_needed(settings: dict) -> None:
    with pytest.raises(ValueError, match="needs a VAE and a decoder"):
        perflow_small_decoder(**settings)
