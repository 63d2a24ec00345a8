"""World mmdit of the benchmarks with very little work: python _mmdit_worker.py ROOT FOLDER. Prints a line of JSON."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import few_step
import recipes
import torch
from evaluation import Evaluation, host_sampler
from worlds import MMDiTWorld

from opensora_perflow.hosts.v2.flux import hooks_of

root, folder = map(Path, sys.argv[1:])
few_step.set_up_process()
world = MMDiTWorld(root, folder / "teacher.safetensors", num_clips=4, steps=2)
again = MMDiTWorld(root, folder / "teacher.safetensors", num_clips=4, steps=0)  # reads the file
same = all(torch.equal(one, two) for one, two in zip(world.teacher.parameters(), again.teacher.parameters()))
scale = recipes.Scale(iterations=2, batch_size=2, lr=0.0, num_samples=2)
evaluation = Evaluation.of(world, 2, seed=0, floor=False, reference_steps=4)
guided, unguided = (host_sampler(world, 4) for _ in range(2))
unguided.guidance = 1.0
found = {"same": same, "before": evaluation.metrics(evaluation.sample(guided, world.teacher))}
for name, settings, chains in (("ours", recipes.OURS, 0), ("reference", recipes.REFERENCE, 0), ("stored", recipes.OURS, 3)):
    recipe = recipes.Recipe(name, settings, 2, steps=(4,), chains=chains)
    result = few_step.train(recipe, world, 0, evaluation, scale)
    hooks, _ = hooks_of(result["student"])
    row = {key: value for key, value in result["rows"][0].items() if not isinstance(value, torch.Tensor)}
    found[name] = {**row, "rows": hooks.evaluations}
found["after"] = evaluation.metrics(evaluation.sample(guided, world.teacher))
found["unguided"] = evaluation.metrics(evaluation.sample(unguided, world.teacher))
print(json.dumps(found))
