"""The search that the scheduler's defaults come from: one change at a time, everything else alike, on the worlds of worlds.py.

    python benchmarks/tune.py [--world mixture video] [--size cpu|full|gpu] [--seeds 0 1 2] [--recipes NAME ...]
                              [--jobs N] [--out FOLDER]

Same columns and files as few_step.py, with half of its iterations.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from few_step import arguments, run
from recipes import OURS, REFERENCE, Recipe, changed
from worlds import World


def candidates(world: World, iterations: int) -> list[Recipe]:
    iterations //= 2

    def change(name: str, **settings: Any) -> Recipe:
        return Recipe(name, changed(OURS, **settings), iterations, steps=(4, 8))

    return [
        change("ours"),
        Recipe("reference recipe", REFERENCE, iterations, steps=(4, 8)),
        *(
            Recipe(f"{name}, {factor:.2g} of the learning rate", settings, iterations, steps=(4, 8), lr_factor=factor)
            for name, settings in (("ours", OURS), ("reference", REFERENCE))
            for factor in (1 / 9, 1 / 3, 3.0, 9.0)
        ),
        *(change(f"edge_mass={mass}", draws=dict(edge_mass=mass)) for mass in (0.0, 0.25, 0.5, 0.9)),
        change("edge_mass=1, per_solve=1", draws=dict(edge_mass=1.0, per_solve=1)),
        change("starts=diffused", draws=dict(starts="diffused")),
        change("per_solve=1", draws=dict(per_solve=1)),
        change("per_solve=4", draws=dict(per_solve=4)),
        change("teacher: 8 Euler steps", teacher=dict(steps_per_window=8, solver="euler")),
        change("teacher: 4 Euler steps", teacher=dict(steps_per_window=4, solver="euler")),
        change("teacher: 1 midpoint step", teacher=dict(steps_per_window=1)),
        change("teacher: 4 midpoint steps", teacher=dict(steps_per_window=4)),
        change("+ 0.1 direction", objective=["perflow", dict(type="perflow_direction", weight=0.1)]),
        change("phased", objective="perflow_phased"),
        change("perflow + phased", objective=["perflow", "perflow_phased"]),
        change("consistency, student target", objective="perflow_consistency"),
        change("consistency, solution target", objective=dict(type="perflow_consistency", target="solution")),
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--out", type=Path, default=Path("outputs/tune"), help="folder (default outputs/tune)")
    run(parser.parse_args(), "tune.py", candidates)


if __name__ == "__main__":
    main()
