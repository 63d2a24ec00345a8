"""How near the demo's reference is to the teacher's converged path, beside 512 Euler steps.

    python benchmarks/reference.py [--samples 16] [--seed 0]

Prints the endpoint error of each against 192 uniform midpoint steps, and what the teacher's 30 and 4 Euler steps err by when
each is the reference; about 2 CPU minutes.
"""

from __future__ import annotations

import argparse

from few_step import set_up_process

from opensora_perflow.method.metrics import endpoint_error
from opensora_perflow.planning.fine_path import uniform_grid
from opensora_perflow.tools.compare import reference_times
from opensora_perflow.tools.probes import video_probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16, help="noises (default 16)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    args = parser.parse_args()
    set_up_process()
    probe, times = video_probe(args.samples, args.seed), reference_times()
    converged = probe.sample(uniform_grid(192), "midpoint")
    ends = {steps: probe.sample(uniform_grid(steps)) for steps in (30, 4)}
    references = {
        "192 midpoint steps": converged,
        "512 Euler steps": probe.sample(uniform_grid(512)),
        "36 uniform midpoint steps": probe.sample(uniform_grid(36), "midpoint"),
        f"the demo's {len(times) - 1} midpoint steps": probe.sample(times, "midpoint"),
    }
    print("| reference | from the converged path | 30 Euler steps from it | 4 Euler steps from it |\n|---|---|---|---|")
    for name, x in references.items():
        errors = [endpoint_error(x, converged), *(endpoint_error(end, x) for end in ends.values())]
        print(f"| {name} | {' | '.join(f'{error:.4f}' for error in errors)} |", flush=True)


if __name__ == "__main__":
    main()
