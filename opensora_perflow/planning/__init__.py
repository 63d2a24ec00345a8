"""Where steps and windows should lie, measured on a network: see `fine_path`, `shortest_path`, `grids`, `windows`, `extra_steps`.

Algorithms here know fields and times and no host; what they find goes into a plan (plan_file.py), which `windows` of a scheduler
config reads.
"""
