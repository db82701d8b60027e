"""Metrics that a clock measured: two runs of one seed need not agree in them."""

TIMES = ("seconds/", "tokens_per_second/", "flops_per_second/", "mfu/", "rollout/idle")
