"""What one training step of a bucket takes: memory at its peak, time, and what would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from math import prod

from opensora_perflow.hosts.outline import Bucket, Outline
from opensora_perflow.tools.activations import Cost, cost, flops
from opensora_perflow.tools.step_units import Units

GIB, TERA = 2**30, 1e12
TEXT = ("text encoder", "CLIP")
TRAINED = ("gradients", "masters", "optimizer", "EMA")


@dataclass(frozen=True)
class Memory:
    """Of one GPU.

    parts: Bytes that do not depend on the bucket, by name. cost: Of one evaluation. evaluations: Those whose graphs are kept
    together. trained: Parameters that this GPU updates.
    """

    parts: Mapping[str, int]
    cost: Cost
    evaluations: int
    checkpointing: bool
    trained: int

    @property
    def resident(self) -> int:
        """Between steps: without gradients."""
        return sum(size for name, size in self.parts.items() if name != "gradients")

    @property
    def peak(self) -> int:
        """The largest of three moments: the forward's end; the last evaluation's backward, beside the gradients; and the
        update, which makes the gradients float32."""
        each, again = self._kept(self.checkpointing)
        gradients = self.parts["gradients"]
        backward = (self.evaluations - 1) * each + again + gradients
        return self.resident + max(self.evaluations * each + again, backward, gradients + 4 * self.trained)

    def activations(self, *checkpointing: bool) -> list[int]:
        """Bytes at the forward's end, without and with checkpointing."""
        kept = map(self._kept, checkpointing)
        return [self.evaluations * each + again for each, again in kept]

    def scaled(self, share: float) -> Memory:
        """With a share of the samples."""
        found = {field.name: int(getattr(self.cost, field.name) * share) for field in fields(Cost)}
        return replace(self, cost=Cost(**found))

    def without(self, *names: str) -> Memory:
        """Without some of the parts."""
        return replace(self, parts={name: 0 if name in names else size for name, size in self.parts.items()})

    def _kept(self, checkpointing: bool) -> tuple[int, int]:
        """Bytes of one evaluation, and of the block that is computed anew."""
        return (self.cost.checkpointed, self.cost.block) if checkpointing else (self.cost.kept, 0)


def memory_of(plan: Outline, bucket: Bucket, parts: Mapping[str, int], gpus: int) -> Memory:
    """What a step of a bucket takes on each GPU."""
    units, rows = Units.of(plan.recipe), bucket.batch
    if plan.rows_together:
        rows *= units.trained
    found = cost(plan.network, lambda: plan.forward(bucket, rows))
    share = plan.sequence_parallel  # of the sequence, and with it of nearly all that is kept
    found = Cost(
        *(getattr(found, name) // share for name in ("kept", "checkpointed", "block")), found.flops * bucket.batch // rows
    )
    trained = sum(-(-parameter.numel() // gpus) for parameter in plan.network.parameters() if parameter.requires_grad)
    return Memory(parts, found, 1 if plan.rows_together else units.trained, plan.checkpointing, trained)


def seconds_of(plan: Outline, bucket: Bucket, memory: Memory, tflops: float) -> float:
    """A step's, of the network and the VAE."""
    forwards = Units.of(plan.recipe).forwards(plan.checkpointing, plan.adapters)
    encoding = 0 if plan.encode is None else flops(lambda: plan.encode(bucket))
    return (forwards * memory.cost.flops / plan.sequence_parallel + encoding) / (tflops * TERA)


def stored_bytes(plan: Outline, bucket: Bucket) -> int:
    """Of a clip's window ends on disk, in half precision, and of its latents where windows start at them."""
    if plan.recipe is None:
        return 0
    return 2 * (plan.recipe.windows.num_windows + (plan.recipe.draws.starts == "diffused")) * prod(bucket.latent)


def changes(bucket: Bucket, memory: Memory, limit: float) -> list[str]:
    """What would make a bucket fit into a limit, in bytes, with the peak then: each that does so alone, or else the first few
    together."""
    options: dict[str, Callable[[Memory], Memory]] = {}
    if not memory.checkpointing:
        options["grad_checkpoint=True"] = lambda now: replace(now, checkpointing=True)
    if memory.parts["teacher"]:  # adapters' own states are left out: hundredths
        options["adapters (LoRA)"] = lambda now: replace(now.without("teacher", *TRAINED), trained=0)
    if any(memory.parts.get(name) for name in TEXT):
        options["texts encoded beforehand"] = lambda now: now.without(*TEXT)
    if memory.evaluations > 1:
        options["draws=dict(per_solve=1)"] = lambda now: replace(now, evaluations=1)
    alone = {name: change(memory).peak for name, change in options.items()}
    most = _largest_batch(bucket.batch, memory, limit)
    if most:
        alone[f"batch size {most}"] = memory.scaled(most / bucket.batch).peak
    fitting = [_told(name, peak) for name, peak in alone.items() if peak <= limit]
    if fitting:
        return fitting
    named = []
    for name, change in options.items():
        memory = change(memory)
        named.append(name)
        most = _largest_batch(bucket.batch, memory, limit)
        if most:
            peak = memory.scaled(most / bucket.batch).peak
            return [_told(", ".join([*named, *([f"batch size {most}"] if most < bucket.batch else [])]), peak)]
    return ["more GPUs, or larger ones"]


def _largest_batch(most: int, memory: Memory, limit: float) -> int:
    """The most samples of a bucket of `most` that fit; 0: none does."""
    return sum(memory.scaled(size / most).peak <= limit for size in range(1, most + 1))  # peaks grow with the batch


def _told(change: str, peak: int) -> str:
    return f"{change} ({peak / GIB:.1f} GiB)"
