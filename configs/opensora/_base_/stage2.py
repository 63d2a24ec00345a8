# Stage 2: fold guidance into the weights. Sampling needs one evaluation a step instead of two.

scheduler = dict(
    type="perflow",
    windows=4,
    prediction="auto",
    teacher=dict(
        from_pretrained=None,  # the original model (v1.2: "hpcai-tech/OpenSora-STDiT-v3"), or None as in stage 1
        steps_per_window=None,  # 8 over the number of windows
        solver="midpoint",
    ),
    draws=dict(
        starts="student",  # where the student arrives from noise, at one evaluation a window on the way
        edge_mass=0.75,
        per_solve=2,
    ),
    guidance=dict(mode="fixed", scale=7.0),  # the scale that the teacher would be sampled with, >= 0
    objective="perflow",
    use_timestep_transform=True,
)
