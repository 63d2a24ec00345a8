"""Joining clips that share frames: how a change of the shared frames is faded into the frames beside them."""

import torch
import torch.nn.functional as F
from torch import Tensor


def fade_change(x: Tensor, reference: Tensor, kept: Tensor, num_frames: int) -> Tensor:
    """Put kept frames back as they were given, and hand the difference on to the generated frames beside them.

    Two clips of a long video share frames: those that end the one and, as reference frames, begin the other. Where the second
    clip made them anew, its further frames continue its own version of them, and the joint shows the difference. Fading it out
    over the following frames is a cross-fade of the two versions. More cannot be done once the first clip is done.

    Args:
        x: A clip, [B, C, T, H, W].
        reference: Holds the kept frames as given; other frames are not read. Shaped like x.
        kept: bool [B, T].
        num_frames: n >= 0. Take a generated frame at a distance d <= n from a kept one, with no other kept one in between. The
            frame is moved by (1 - d / (n + 1)) times the kept frame's difference; one between two kept frames by both.

    Returns:
        Shape and dtype of x, kept frames equal to `reference`.
    """
    frames = kept[:, None, :, None, None]
    difference = torch.where(frames, reference - x, 0.0)
    out = torch.where(frames, reference, x)
    for step in (1, -1):
        carried, reached = difference, frames
        for d in range(1, num_frames + 1):
            # By one frame, later for step 1 and earlier for -1; what comes in is zero.
            carried, reached = (F.pad(moved, (0, 0, 0, 0, step, -step)) for moved in (carried, reached))
            reached = reached & ~frames
            out = torch.where(reached, out + (1.0 - d / (num_frames + 1)) * carried, out)
    return out
