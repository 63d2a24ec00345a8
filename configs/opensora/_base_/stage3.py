# Stage 3: fewer windows. The student of stage 2 is the teacher: its windows are straight, so few steps solve them, and its
# guidance is folded in, so it needs none.

scheduler = dict(
    type="perflow",
    windows=2,
    prediction="auto",
    teacher=dict(
        from_pretrained=None,  # the student's weights at the first step, which are stage 2's
        allow_distilled=True,  # the teacher is a PeRFlow student, and that is meant
        steps_per_window=4,  # two steps for each window of stage 2
        solver="euler",
    ),
    guidance=dict(mode="fixed", scale=1.0),  # 1 = a teacher that needs no guidance
    objective="perflow",
    use_timestep_transform=True,
)
