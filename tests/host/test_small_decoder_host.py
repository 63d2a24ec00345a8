"""`perflow_small_decoder` on the real VAE of Open-Sora 1.2 with small random autoencoders."""

from __future__ import annotations

from pathlib import Path

import pytest
from _harness import run_python

pytestmark = pytest.mark.host

SCRIPT = """
import sys, torch
from opensora_perflow.run import prepare
prepare(sys.argv[1] + "/scripts/inference.py")
from diffusers import AutoencoderKL, AutoencoderTiny
from opensora.registry import MODELS, build_module
import opensora.models
torch.manual_seed(0)
small = dict(block_out_channels=(8, 8, 8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4, scaling_factor=0.13025)
kl = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **small)
AutoencoderKL.from_pretrained = classmethod(lambda cls, *args, **settings: kl)
AutoencoderTiny().save_pretrained(sys.argv[2])
tiny = AutoencoderTiny.from_pretrained(sys.argv[2])
base = dict(type=sys.argv[3], micro_batch_size=4)
vae = build_module(dict(type="perflow_small_decoder", base=base, decoder=sys.argv[2]), MODELS).eval()
x = torch.randn(2, 4, 5, 4, 6)
if sys.argv[3] == "OpenSoraVAE_V1_2":
    video = vae.decode(x, num_frames=17)
    assert video.shape == (2, 3, 17, 32, 48), video.shape
    assert vae.encode(video).shape == x.shape
    x = vae.temporal_vae.decode(x, num_frames=17)
    seen = vae.spatial_vae.decode(x)
else:
    seen = vae.decode(x)
x = x / 0.18215 * 0.13025
frames = [torch.stack([tiny.decode(x[b, :, t][None]).sample[0] for t in range(x.shape[2])], 1) for b in range(2)]
torch.testing.assert_close(seen, torch.stack(frames), atol=1e-5, rtol=0)
assert sum(p.numel() for p in kl.decoder.parameters()) == 0
print("decoded")
"""


@pytest.mark.parametrize("base", ["OpenSoraVAE_V1_2", "VideoAutoencoderKL"])
def test_frames_are_decoded_by_the_small_one(host_root: Path, host_tag: str, tmp_path: Path, base: str) -> None:
    """As AutoencoderTiny decodes each frame from latents at its own scale. Batched convolutions add up in another order."""
    if host_tag not in ("1.2", "1.3"):
        pytest.skip("the VAE of 1.2 is in the checkouts of 1.2 and 1.3")
    assert "decoded" in run_python(
        ["-c", SCRIPT, str(host_root), str(tmp_path / "tiny"), base], nproc=1, log=tmp_path / "log", cwd=tmp_path
    )
