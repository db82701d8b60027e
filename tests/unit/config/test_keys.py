"""Fields that say that their value may change when a run goes on."""

from __future__ import annotations

from megatron_r1.config.keys import keys_that_may_change


def test_a_run_folder_of_before_resumes_with_the_freedom_of_then():
    assert keys_that_may_change() >= set(FREE.split())


#: what could change before more fields said so
FREE = """
    run_dir
    checkpoint.interval checkpoint.keep checkpoint.asynchronous checkpoint.rollouts_plain_mb checkpoint.rollouts_most_mb
    checkpoint.rollouts_tokens_mb
    pretrain.checkpoint_interval
    runtime.threads runtime.collective_timeout_seconds runtime.skip_nonfinite_updates
    runtime.heartbeat.interval_seconds runtime.heartbeat.lost_seconds runtime.heartbeat.stall_seconds
    parallel.tp parallel.pp parallel.vpp parallel.ep parallel.etp parallel.cp parallel.sequence_parallel
    rollout.placement rollout.engines_per_node rollout.servers rollout.transfer
    rollout.start_timeout_seconds rollout.step_timeout_seconds rollout.stall_seconds rollout.restarts
    sft.workers reward.workers reward.max_unscorable_share
    reward.judge.url reward.judge.api_key_file reward.judge.cache reward.judge.concurrency
    reward.judge.timeout_seconds reward.judge.retries reward.code.cpp_cache_mb
"""
