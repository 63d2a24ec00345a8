"""Bytes that stay on each GPU through a training: weights, gradients, optimizer, average, teacher. Exact, by arithmetic."""

from __future__ import annotations

from torch import Tensor, nn

from opensora_perflow.hosts.meta import tensors_of


def residents(
    network: nn.Module,
    gpus: int,
    *,
    copied_teacher: bool,
    ema: bool = True,
    adapters: bool = False,
    masters: bool = True,
    sharded_gradients: bool = True,
) -> dict[str, int]:
    """Part -> bytes a GPU.

    Args:
        network: In its dtype; on any device.
        gpus: That share optimizer, masters, average and (ZeRO-2) gradients, each parameter rounded up to equal shares.
        copied_teacher: Is the teacher a second copy of the network?
        ema: Is there a float32 average on the GPUs? Of adapters alone where they alone are trained.
        masters: Are there float32 masters beside trained weights of half precision?
        sharded_gradients: Does each GPU keep its share alone?
    """
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    averaged, buffers = (trained, []) if adapters else (list(network.parameters()), list(network.buffers()))

    def share(tensor: Tensor) -> int:
        return -(-tensor.numel() // gpus)

    def averaged_buffer(tensor: Tensor) -> int:
        return 4 * tensor.numel() if tensor.is_floating_point() else tensor.nbytes

    half = masters and any(parameter.dtype.itemsize < 4 for parameter in trained)
    weights = sum(tensor.nbytes for tensor in tensors_of(network))
    return {
        "weights": weights,
        "gradients": sum((share(p) if sharded_gradients else p.numel()) * p.dtype.itemsize for p in trained),
        "masters": 4 * sum(map(share, trained)) if half else 0,
        "optimizer": 8 * sum(map(share, trained)),
        "EMA": 4 * sum(map(share, averaged)) + sum(map(averaged_buffer, buffers)) if ema else 0,
        "teacher": weights if copied_teacher else 0,
    }
