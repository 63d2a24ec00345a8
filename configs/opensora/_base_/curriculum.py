# Fewer windows stage by stage, down to one (InstaFlow), in one run. Guidance is folded in.

scheduler = dict(
    type="perflow",
    windows=8,  # of the first stage: their number, or edges such as [1, ..., 0]
    prediction="auto",
    curriculum=dict(
        windows=[8, 4, 2, 1],  # of each stage; each number divides the one before
        # The student of the stage before teaches: an eighth of the original teacher's evaluations, and a larger error.
        # "original" = the same teacher in every stage.
        teacher="previous",
        advance=dict(
            min_steps=500,  # of every stage, >= 1
            max_steps=4000,  # of every stage but the last, >= min_steps
        ),
    ),
    teacher=dict(
        from_pretrained=None,  # the original model, or None = the student's weights at the first step
        steps_per_window=None,  # ODE steps in each of the first stage's windows, >= 1; None = 8 over their number
        solver="midpoint",
    ),
    guidance=dict(mode="fixed", scale=7.0),  # the scale that the original teacher would be sampled with, >= 0
    objective="perflow",
    use_timestep_transform=True,
)
