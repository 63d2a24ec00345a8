"""Where steps and windows should lie, measured on a network.

fine_path and shortest_path are the tools. grids places the steps of a network as it is, windows the edges of a student to come.
extra_steps places further steps of a student that is there. Algorithms here know fields and times and no host; what they find
goes into a plan (plan_file.py), which `windows` of a scheduler config reads.
"""
