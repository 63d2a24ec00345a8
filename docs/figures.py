"""The method page's figures, from the package's own windows, warp and solver: `python docs/figures.py` writes docs/*.svg."""

from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure

from opensora_perflow.conventions import shift_time
from opensora_perflow.hosts.v1.timestep_transform import shift_ratio
from opensora_perflow.method.solvers import states
from opensora_perflow.method.windows import TimeWindows
from opensora_perflow.worlds.mixture import DIM, NUM_CLASSES, NUM_MODES, NUM_TIMESTEPS, ClassText, Mixture, MixtureNetwork

FOLDER = Path(__file__).parent
TEACHER, STUDENT = "#8a8a8a", "#d1495b"
SIZES = {
    "no warp": None,
    "240p, 1 frame": (240, 426, 1),
    "360p, 51 frames": (360, 640, 51),
    "720p, 102 frames": (720, 1280, 102),
}


def main(folder: Path = FOLDER) -> None:
    """Write warp.svg and path.svg; the same files from the same matplotlib."""
    matplotlib.rcParams["svg.hashsalt"] = "opensora_perflow"
    for name, figure in {"warp.svg": warp(), "path.svg": path()}.items():
        figure.savefig(folder / name, metadata={"Date": None})


def warp(edges: tuple[float, ...] = TimeWindows.uniform(4).edges) -> Figure:
    """Flow time over untransformed time for a few sizes of video, and where the edges of four windows lie."""
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 3])
    u, cuts = torch.linspace(0, 1, 201, dtype=torch.float64), torch.tensor(edges, dtype=torch.float64)
    for row, (name, size) in enumerate(SIZES.items()):
        ratio = None if size is None else _ratio(*size)
        color = f"C{row}"
        left.plot(u, shift_time(u, ratio), color=color)
        left.plot(cuts, shift_time(cuts, ratio), "o", color=color, markersize=3)
        times = shift_time(cuts, ratio).tolist()
        for k, (t_start, t_end) in enumerate(zip(times, times[1:])):
            right.barh(-row, t_start - t_end, left=t_end, color=color, alpha=1 - 0.2 * k, height=0.6)
            if t_start - t_end > 0.05:
                right.text((t_start + t_end) / 2, -row, str(k), ha="center", va="center", fontsize=9)
        right.text(1.02, -row, name, va="center", fontsize=9)
    left.set(xlabel="untransformed time u", ylabel="flow time t", title="the warp")
    right.set(xlabel="flow time t (1 is noise)", title="windows 0 to 3 of four sizes", xlim=(0, 1), yticks=[])
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def path(num_windows: int = 4, num_paths: int = 9) -> Figure:
    """The teacher's paths of a mixture on a line, and the straight line that a student learns in each window."""
    means = torch.zeros(NUM_MODES, DIM)
    means[:, 0] = torch.where(torch.arange(NUM_MODES) < NUM_MODES // 2, -1.5, 1.0)
    teacher = MixtureNetwork(Mixture(means, torch.arange(NUM_MODES) % NUM_CLASSES, std=0.2), width=1).eval()
    noise = torch.zeros(num_paths, DIM, 1, 1, 1)
    noise[:, 0, 0, 0, 0] = torch.linspace(-2, 2, num_paths)
    text = ClassText().null(num_paths)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return -teacher(x, (t * NUM_TIMESTEPS).float(), text)

    each = 64
    times = torch.linspace(1, 0, num_windows * each + 1, dtype=torch.float64)
    with torch.no_grad():
        fine = states(velocity, noise, times[:, None].expand(-1, num_paths), method="midpoint")
        x = torch.stack([state[:, 0, 0, 0, 0] for state in fine])
        coarse = states(velocity, noise, times[::each, None].expand(-1, num_paths))
        euler = torch.stack([state[:, 0, 0, 0, 0] for state in coarse])
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axis = figure.subplots()
    edges = TimeWindows.uniform(num_windows).edges
    for k, (t_start, t_end) in enumerate(zip(edges, edges[1:])):
        axis.axvspan(t_end, t_start, color="#4c72b0", alpha=0.10 if k % 2 else 0.03, linewidth=0)
        axis.text((t_start + t_end) / 2, 2.25, f"window {k}", ha="center", fontsize=9)
    axis.plot(times[::each], euler, color="#4c72b0", linewidth=0.9, linestyle="--")
    axis.plot(times, x, color=TEACHER, linewidth=1.2)
    axis.plot(times[::each], x[::each], color=STUDENT, linewidth=1.2, marker="o", markersize=3)
    axis.plot([], [], color=TEACHER, label="teacher's path")
    axis.plot([], [], color=STUDENT, marker="o", markersize=3, label="what a student learns: one straight step a window")
    axis.plot([], [], color="#4c72b0", linewidth=0.9, linestyle="--", label="teacher, one Euler step a window")
    axis.set(xlim=(1, 0), ylim=(-2.4, 2.6), xlabel="flow time t: from noise (1) to data (0)", ylabel="state")
    figure.legend(frameon=False, loc="outside upper center", ncols=3, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def _ratio(height: int, width: int, num_frames: int) -> float:
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    return float(shift_ratio({name: torch.tensor([float(size)]) for name, size in sizes.items()}, "v1.2"))


if __name__ == "__main__":
    main()
