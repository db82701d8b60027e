"""Published runs, as numbers with their sources, that the planner is compared with by `python -m benchmarks.plan_vs_published`."""
