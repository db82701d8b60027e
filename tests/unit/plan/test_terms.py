"""Terms add up, and the largest is the one that a setting cuts."""

from __future__ import annotations

from megatron_r1.plan.terms import MemoryPhase, Term, TimePhase


def test_a_phase_is_the_sum_of_its_terms() -> None:
    weights, kept, cache = Term("weights", 30.0), Term("activations", 20.0, "runtime.recompute"), Term("cache", 0.0, "x")
    phase = MemoryPhase("update", (weights, kept, cache), (Term("reference", 5.0, "runtime.offload"),))
    assert (phase.device_bytes, phase.host_bytes) == (50.0, 5.0)
    assert phase.largest() is kept and phase.largest(with_setting=False) is weights
    assert phase.largest(host=True) is phase.host[0] and MemoryPhase("none", ()).largest() is None
    assert MemoryPhase("fixed", (weights, cache)).largest() is weights, "nothing that a setting cuts takes anything"


def test_seconds_follow_each_other() -> None:
    phase = TimePhase("rollout", (Term("prefill", 1.0), Term("decode", 9.0, "rollout.max_num_seqs")), ("weights",))
    assert phase.seconds == 10.0 and phase.largest() is phase.terms[1] and TimePhase("none", ()).largest() is None
