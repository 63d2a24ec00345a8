"""Our formulas beside the public PeRFlow code's: where they agree, and where that code's rounding bites.

    git clone https://github.com/magic-research/piecewise-rectified-flow ../piecewise-rectified-flow
    python benchmarks/public_perflow.py --perflow ../piecewise-rectified-flow [--json out.json]

Needs diffusers, which that code imports; a few seconds on a CPU. Nothing of it is copied: its scheduler and its ODE solver are
imported from the checkout, and the targets are the statement of its training script, compiled from that file. Both sides get
Open-Sora's noise schedule in float64 and the public choice of alpha_bar[0] at t = 0. Checked with commit 87bac76.

First table: largest relative difference of targets and one-step results on random inputs, uniform windows, whole timesteps;
exits with 1 if one exceeds 1e-6. Second table: where the public code is wrong, with our value beside the exact one.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opensora_perflow.method.ddpm import DDPM, alpha_bars, target
from opensora_perflow.method.grids import linear_grid, sampling_grid
from opensora_perflow.method.windows import TimeWindows

TOLERANCE = 1e-6
"""float64 on our side; the public code rounds times to float32 (6e-8) on the way to its tables."""
LOSS_TYPES = {"velocity": "velocity_matching", "ddim_eps": "noise_matching", "diff_eps": "noise_matching"}
TABLE = alpha_bars()


class ToldTime(DDPM):
    """The field that is solved here takes flow times."""

    def to_timestep(self, t: Tensor) -> Tensor:
        return t


PATH = ToldTime(TABLE, final_alpha_bar=TABLE[0].item())
N = len(TABLE)


# --- the public code ---


def load_module(path: Path) -> ModuleType:
    """Import one file of the checkout."""
    spec = importlib.util.spec_from_file_location(f"public_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def absent_modules(*names: str) -> Iterator[None]:
    """Empty stand-ins for modules that the checkout imports and does not use here, where they are not installed."""
    added = [name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None]
    for name in added:
        sys.modules[name] = importlib.util.module_from_spec(ModuleSpec(name, None))  # some look for a module's spec
        sys.modules[name].OmegaConf = None
    try:
        yield
    finally:
        for name in added:
            del sys.modules[name]


class Public:
    """What is used of the checkout: window lookup, alphas, one sampling step, the targets and the teacher's solve."""

    def __init__(self, checkout: Path) -> None:
        with absent_modules("omegaconf"):
            self._scheduler_module = load_module(checkout / "src" / "scheduler_perflow.py")
            self._solver_module = load_module(checkout / "src" / "pfode_solver.py")
        self._targets = self._statement(checkout / "scripts" / "perflow_accelerate_sd.py", "velocity_matching")

    @staticmethod
    def _statement(path: Path, mark: str) -> Any:
        """The `if` of the training script whose condition mentions `mark`, compiled."""
        tree = ast.parse(path.read_text())
        (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.If) and mark in ast.unparse(n.test)]
        return compile(ast.Module([node], []), str(path), "exec")

    def scheduler(self, num_windows: int, prediction: str = "ddim_eps") -> Any:
        settings = dict(num_train_timesteps=N, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        scheduler = self._scheduler_module.PeRFlowScheduler(
            **settings, prediction_type=prediction, num_time_windows=num_windows
        )
        if not torch.allclose(scheduler.alphas_cumprod.double(), TABLE, rtol=1e-4):
            raise AssertionError("the public scheduler's table is not Open-Sora's: this comparison would prove nothing")
        scheduler.alphas_cumprod = TABLE
        return scheduler

    def target(self, x_start: Tensor, x_end: Tensor, t: Tensor, num_windows: int, prediction: str) -> Tensor:
        """The training script's targets at times t [B]."""
        scheduler = self.scheduler(num_windows, prediction)
        t_start, t_end = scheduler.time_windows.lookup_window(t)
        names = dict(
            args=SimpleNamespace(loss_type=LOSS_TYPES[prediction], pred_type=prediction),
            perflow_scheduler=scheduler, timepoints=t, t_start=t_start, t_end=t_end,
            latents=x_start, latents_start=x_start, latents_end=x_end,
        )  # fmt: skip
        exec(self._targets, names)
        return names["targets"]

    def steps(self, output: Tensor, x: Tensor, num_windows: int, num_steps: int, prediction: str) -> list[tuple[float, Tensor]]:
        """(timestep, result) of one step from x at each listed timestep."""
        scheduler = self.scheduler(num_windows, prediction)
        scheduler.set_timesteps(num_steps)
        return [(int(t), scheduler.step(output, t, x).prev_sample) for t in scheduler.timesteps]

    def solve(self, field: Callable, x: Tensor, t_start: Tensor, t_end: Tensor, num_steps: int, num_windows: int) -> Tensor:
        """The teacher's solve with epsilon field(x, t)."""
        teacher = SimpleNamespace(
            config=SimpleNamespace(num_train_timesteps=N, prediction_type="epsilon"), num_train_timesteps=N,
            alphas_cumprod=TABLE, final_alpha_cumprod=TABLE[0], scale_model_input=lambda sample, t: sample,
        )  # fmt: skip
        solver = self._solver_module.PFODESolver(scheduler=teacher)

        def unet(state: Tensor, index: Tensor, **_: Any) -> tuple[Tensor]:
            return (field(state, (index + 1).double() / N),)

        unet.config = SimpleNamespace(time_cond_proj_dim=None)
        return solver.solve(x, unet, t_start, t_end, x, x, guidance_scale=1.0, num_steps=num_steps, num_windows=num_windows)


# --- where both agree ---


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def bounds(windows: TimeWindows, t: Tensor) -> tuple[Tensor, Tensor]:
    return windows.bounds(windows.lookup(t))


def target_difference(public: Public, num_windows: int, prediction: str, generator: torch.Generator) -> float:
    """Largest relative difference of the targets at 64 random whole timesteps."""
    t = (torch.randint(N, (64,), generator=generator) + 1).double() / N
    x_start, x_end = torch.randn(2, 64, 4, 4, 4, dtype=torch.float64, generator=generator)
    ours = target(x_start, x_end, PATH.edges(*bounds(TimeWindows.uniform(num_windows), t)), prediction)
    return relative(ours, public.target(x_start, x_end, t, num_windows, prediction))


def step_difference(public: Public, num_windows: int, num_steps: int, prediction: str, generator: torch.Generator) -> float:
    """Largest relative difference of one sampling step, over the steps of a grid, from random states and outputs.

    Steps whose times the public code truncates to another timestep (see `grid_rows`) are left out.
    """
    windows = TimeWindows.uniform(num_windows)
    output, x = torch.randn(2, 8, 4, 4, 4, dtype=torch.float64, generator=generator)
    velocity = partial(PATH.velocity, lambda state, time: output, prediction, lambda time: bounds(windows, time))
    grid = sampling_grid(windows, num_steps)
    theirs = public.steps(output, x, num_windows, num_steps, prediction)
    listed = [timestep for timestep, _ in theirs] + [0]
    whole = [abs(timestep - t * N) < 1e-6 for timestep, t in zip(listed, grid)]
    differences = []
    for i, (_, result) in enumerate(theirs):
        if whole[i] and whole[i + 1]:
            time = torch.full((8,), grid[i], dtype=torch.float64)
            differences.append(relative(x + (grid[i + 1] - grid[i]) * velocity(x, time), result))
    return max(differences)


def agreement(public: Public, generator: torch.Generator) -> list[dict[str, Any]]:
    rows = []
    for prediction in LOSS_TYPES:
        for num_windows in (1, 2, 4, 5, 8, 10):
            steps = [n for n in (num_windows, 2 * num_windows, 5 * num_windows) if N % n == 0]
            rows.append(
                dict(
                    prediction=prediction, windows=num_windows, steps=steps,
                    target=target_difference(public, num_windows, prediction, generator),
                    one_step=max(step_difference(public, num_windows, n, prediction, generator) for n in steps),
                )
            )  # fmt: skip
    return rows


# --- where the public code is wrong ---


def alpha_bar_by_hand(t: float) -> float:
    """alpha_bar in continuous time, by hand: log alpha_bar is linear between the indices N t - 1."""
    position = max(t * N - 1.0, 0.0)
    low = min(math.floor(position), N - 2)
    a, b = math.log(TABLE[low].item()), math.log(TABLE[low + 1].item())
    return math.exp(a + (position - low) * (b - a))


def gaussian(m: float = 0.8, s: float = 0.4) -> tuple[Callable, Callable]:
    """(epsilon field, exact flow) of data N(m, s^2) on the diffusion."""

    def moments(t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        alpha_bar = torch.tensor([alpha_bar_by_hand(v) for v in t.tolist()], dtype=torch.float64)[:, None, None, None]
        return alpha_bar.sqrt() * m, (alpha_bar * s**2 + 1 - alpha_bar).sqrt(), (1 - alpha_bar).sqrt()

    def field(x: Tensor, t: Tensor) -> Tensor:
        mean, std, sigma = moments(t)
        return sigma * (x - mean) / std**2

    def exact(x: Tensor, t: Tensor, t_end: Tensor) -> Tensor:
        (mean, std, _), (mean_end, std_end, _) = moments(t), moments(t_end)
        return mean_end + std_end / std * (x - mean)

    return field, exact


def lookup_rows(public: Public) -> list[dict[str, Any]]:
    """Window of a time, (t_start, t_end): near 0, and just above an edge."""
    rows, windows = [], TimeWindows.uniform(4)
    for t, exact in ((1e-4, (0.25, 0.0)), (5e-5, (0.25, 0.0)), (0.75005, (1.0, 0.75)), (0.25009, (0.5, 0.25))):
        time = torch.tensor([t], dtype=torch.float64)
        try:
            theirs: Any = tuple(v.item() for v in public.scheduler(4).time_windows.lookup_window(time))
        except IndexError as error:
            theirs = f"IndexError: {error}"
        ours = tuple(v.item() for v in bounds(windows, time))
        rows.append(dict(case=f"K=4, t={t:g}: window", exact=exact, public=theirs, ours=ours))
    return rows


def grid_rows(public: Public) -> list[dict[str, Any]]:
    """Sampling timesteps: whole numbers that floating point leaves just below themselves, and fractions."""
    rows = []
    for num_windows, num_steps in ((1, 5), (5, 10), (3, 3)):
        scheduler = public.scheduler(num_windows)
        scheduler.set_timesteps(num_steps)
        exact = [round(1000 * float(1 - Fraction(i, num_steps)), 3) for i in range(num_steps)]
        ours = [round(t * N, 3) for t in sampling_grid(TimeWindows.uniform(num_windows), num_steps)[:-1]]
        case = f"K={num_windows}, {num_steps} steps: timesteps"
        rows.append(dict(case=case, exact=exact, public=scheduler.timesteps.tolist(), ours=ours))
    return rows


def amplitude_rows(public: Public) -> list[dict[str, Any]]:
    """gamma = alpha(t_start) / alpha(t_end), which all epsilon targets and steps contain, where K does not divide 1000."""
    rows = []
    for num_windows, t in ((3, 0.5), (6, 0.6), (7, 0.9)):
        time = torch.tensor([t], dtype=torch.float64)
        start, end = bounds(TimeWindows.uniform(num_windows), time)
        exact = math.sqrt(alpha_bar_by_hand(start.item()) / alpha_bar_by_hand(end.item()))
        theirs = public.scheduler(num_windows).get_window_alpha(time.float())[4].item()
        ours = (PATH.alpha(start) / PATH.alpha(end)).item()
        rows.append(dict(case=f"K={num_windows}, t={t:g}: gamma", exact=exact, public=theirs, ours=ours))
    return rows


def solve_rows(public: Public, generator: torch.Generator) -> list[dict[str, Any]]:
    """Mean end state of a teacher's solve on Gaussian data; the exact flow is known. Uniform K = 4 is the control."""
    rows = []
    field, exact_flow = gaussian()
    x = 0.5 + torch.randn(16, 1, 2, 2, dtype=torch.float64, generator=generator)
    cases = [("K=4", TimeWindows.uniform(4), 1), ("K=3", TimeWindows.uniform(3), 1), ("K=7", TimeWindows.uniform(7), 3)]
    cases += [(str(list(e)), TimeWindows(e), 1) for e in ((1.0, 0.6, 0.2, 0.0), (1.0, 0.9, 0.5, 0.0))]
    for name, windows, k in cases:
        for steps in (8, 32):
            start, end = (v.expand(16).clone() for v in windows.bounds(torch.tensor([k])))
            exact = exact_flow(x, start, end)
            theirs = public.solve(field, x, start, end, steps, windows.num_windows)
            *_, ours = PATH.states(field, x, linear_grid(start, end, steps))
            rows.append(
                dict(
                    case=f"{name}, t {start[0]:.4g} -> {end[0]:.4g}, {steps} DDIM steps: x_end of the first sample",
                    exact=exact[0, 0, 0, 0].item(), public=theirs[0, 0, 0, 0].item(), ours=ours[0, 0, 0, 0].item(),
                    public_error=relative(theirs, exact), ours_error=relative(ours, exact),
                )
            )  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--perflow", type=Path, required=True, help="checkout of magic-research/piecewise-rectified-flow")
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default 0)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    if not (args.perflow / "src" / "scheduler_perflow.py").is_file():
        parser.error(f"--perflow must be a checkout of magic-research/piecewise-rectified-flow, got {str(args.perflow)!r}")
    torch.set_default_dtype(torch.float64)  # the public code divides integer timesteps into the default dtype
    public, generator = Public(args.perflow), torch.Generator().manual_seed(args.seed)

    agreeing = agreement(public, generator)
    print("largest relative difference, ours to public\nprediction   K   target    one step  (steps)")
    for row in agreeing:
        print(f"{row['prediction']:<10} {row['windows']:>3}   {row['target']:.1e}   {row['one_step']:.1e}  {row['steps']}")
    wrong = [*lookup_rows(public), *grid_rows(public), *amplitude_rows(public), *solve_rows(public, generator)]
    print("\nwhere the public code's rounding bites")
    for row in wrong:
        shown = {key: f"{v:.6f}" if isinstance(v, float) else str(v) for key, v in row.items()}
        errors = f"  relative error {row['public_error']:.1e} / {row['ours_error']:.1e}" if "ours_error" in row else ""
        print(f"{shown['case']}\n    exact {shown['exact']}   public {shown['public']}   ours {shown['ours']}{errors}")
    worst = max(max(row["target"], row["one_step"]) for row in agreeing)
    print(f"\n{len(agreeing)} rows, largest relative difference {worst:.1e} (accepted: {TOLERANCE:.0e})")
    if args.json:
        args.json.write_text(json.dumps(dict(agreement=agreeing, wrong=wrong), indent=1))
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
