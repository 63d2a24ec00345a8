"""The optimizer that every benchmark's students are trained with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

WARMUP = 50


def distil(
    student: nn.Module, loss: Callable[[], Tensor], *, iterations: int, lr: float, desc: str, constant: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
) -> Iterator[tqdm]:  # fmt: skip
    """Train by Adam: a warm-up of 50 steps (or a tenth of all), then half a cosine to 0; gradients clipped to norm 1.

    Args:
        student: Put into train mode; its parameters that require gradients are trained.
        loss: Draws a batch and returns its loss; called once a step.
        iterations: Steps.
        lr: Peak learning rate.
        desc: Of the progress bar.
        constant: Stay at the peak, as Open-Sora's scripts do.
        betas: Of Adam.

    Yields:
        The progress bar, after each step.
    """
    student.train()
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr, betas=betas)
    warmup = min(WARMUP, iterations // 10 + 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min((i + 1) / warmup, 1.0 if constant else 0.5 + 0.5 * math.cos(math.pi * i / iterations)),
    )
    with tqdm(total=iterations, desc=desc, unit="step", leave=False, mininterval=1) as bar:
        for _ in range(iterations):
            value = loss()
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            rate.step()
            bar.update()
            yield bar
