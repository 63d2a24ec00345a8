# Stage 1: straighten the flow in 4 windows. Guidance stays at sampling time.

scheduler = dict(
    type="perflow",
    windows=4,  # number of uniform windows, or edges such as [1, 0.75, 0.5, 0.25, 0]
    prediction="auto",  # what the network outputs; velocity for 1.2 and 1.3
    teacher=dict(
        from_pretrained=None,  # None = the student's weights at the first step. To resume: the teacher's checkpoint
        steps_per_window=None,  # ODE steps a window, >= 1; None = 8 over the number of windows
        solver="midpoint",  # or euler (one evaluation a step instead of two)
    ),
    draws=dict(
        starts="student",  # windows start where the student itself arrives from noise; "diffused" = at data with noise
        edge_mass=0.75,  # share of the times at the window's noisy edge, where a step of the sampler begins, 0..1
        per_solve=2,  # times that one solution of the teacher feeds, >= 1; each evaluates the student
    ),
    guidance=dict(mode="sync"),  # sampled with cfg_scale: 2 evaluations a step
    cfg_scale=7.0,  # the scale that the student will be sampled with, which its starts are reached with too, >= 0
    objective="perflow",
    use_timestep_transform=True,  # as upstream
)
