"""Megatron-Core's switches for speed and memory: the section `megatron`.

Names are those of Megatron-Core 0.16.1 (`TransformerConfig`, `DistributedDataParallelConfig`, `OptimizerConfig`) or, where a field
there covers more than is meant here, of Megatron-LM's command line. What stands elsewhere already stays there: sizes in `parallel`,
recomputation in `runtime.recompute` and `runtime.recompute_modules`, moments and master weights on the host between updates in
`runtime.offload`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import MAY_CHANGE, Section

_AUTO = "null: on where layout and device have it, as `megatron-r1 doctor` says."


class MegatronConfig(Section):
    """How Megatron-Core computes and communicates. true is refused where layout or device do not have it."""

    moe_grouped_gemm: bool | None = Field(
        None,
        description=f"Whether the products of a rank's experts are one call (TEGroupedMLP). Needs Transformer Engine. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    moe_permute_fusion: bool | None = Field(
        None,
        description=f"Whether tokens are put into the order of experts and back by fused kernels. Needs Transformer Engine 2.1. "
        f"{_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    moe_router_fusion: bool | None = Field(
        None,
        description="Whether experts are chosen by one fused kernel. Needs Transformer Engine 2.7, and a router whose groups are "
        f"scored as Megatron-Core scores them: V3's and qwen3_moe's, not V2's. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    bias_swiglu_fusion: bool | None = Field(
        None,
        description="Whether SwiGLU of dense layers and shared experts is one kernel that keeps its input alone for the backward "
        f"pass (bias_activation_fusion of TransformerConfig). Works on the CPU, too, where null is off. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    cross_entropy_loss_fusion: bool = Field(
        False,
        description="Whether the loss is Megatron-Core's fused cross entropy (cross_entropy_fusion_impl=native) instead of ours, "
        "which needs a third of its memory. Its gradient is rounded to bf16, so it needs runtime.dtype=bf16. Works on the CPU.",
        json_schema_extra=MAY_CHANGE,
    )
    apply_rope_fusion: bool | None = Field(
        None,
        description="Whether RoPE is one fused kernel. Needs Transformer Engine and, with latent attention, a model with YaRN. "
        f"{_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    gradient_accumulation_fusion: bool | None = Field(
        None,
        description="Whether weight gradients are added to their fp32 sums inside the product: in Transformer Engine's layers and, "
        f"where Apex was built with its fused_weight_gradient_mlp_cuda, in embedding and output layer, too. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    overlap_grad_reduce: bool | None = Field(
        None,
        description="Whether gradients are reduced over data-parallel ranks while the backward pass goes on. Works on the CPU, "
        f"too, where null is off. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    overlap_param_gather: bool | None = Field(
        None,
        description="Whether updated weights are gathered while the next forward pass goes on, instead of at the end of the "
        "update; whoever reads them before has them gathered. Needs megatron.overlap_grad_reduce. Works on the CPU, too, where "
        f"null is off. {_AUTO}",
        json_schema_extra=MAY_CHANGE,
    )
    moe_shared_expert_overlap: bool = Field(
        False,
        description="Whether shared experts are computed while tokens travel to the routed ones. Needs CUDA, "
        "megatron.moe_token_dispatcher_type=alltoall, and no megatron.overlap_moe_expert_parallel_comm.",
        json_schema_extra=MAY_CHANGE,
    )
    overlap_moe_expert_parallel_comm: bool = Field(
        False,
        description="Whether one micro-batch's tokens travel between experts while another is computed. Needs CUDA, bf16, "
        "parallel.ep above 1, virtual stages where parallel.pp is above 1, and sequences that are not packed: pretraining without "
        "pretrain.mask_documents.",
        json_schema_extra=MAY_CHANGE,
    )
    moe_token_dispatcher_type: Literal["alltoall", "flex"] = Field(
        "alltoall",
        description="How tokens reach their experts. flex: by DeepEP (moe_flex_dispatcher_backend=deepep), which must be "
        "installed, on CUDA with parallel.ep above 1; V3 section 3.2.2 describes its kernels.",
        json_schema_extra=MAY_CHANGE,
    )
    pipeline_model_parallel_layout: str | None = Field(
        None,
        description="Which layers each pipeline stage has, as in Megatron-LM, e.g. 'Et*3|(tt|)*29m|L' with E the embedding, t a "
        "layer, m multi-token prediction, L the loss: parallel.pp x parallel.vpp stages, virtual ones in turn. m stands beside L. "
        "null: layers are divided evenly.",
        json_schema_extra=MAY_CHANGE,
    )
    batch_p2p_comm: bool | None = Field(
        None,
        description="Whether a pipeline's messages are sent in batches. null: yes without virtual stages, no with them, where "
        "Megatron-Core pairs the wrong ones over two ranks.",
        json_schema_extra=MAY_CHANGE,
    )
    fp8: Literal["e4m3", "hybrid"] | None = Field(
        None,
        description="Number format of the linear layers' products: e4m3 for all, as V3 section 3.3, or hybrid, whose gradients are "
        "e5m2. Embedding, output layer, router, norms and attention itself stay in bf16. Needs CUDA with FP8, Transformer Engine "
        "and runtime.dtype=bf16. null: no FP8.",
    )
    fp8_recipe: Literal["blockwise", "mxfp8", "tensorwise", "delayed"] = Field(
        "blockwise",
        description="What shares a scale in FP8. blockwise: tiles of 1 x 128 activations and 128 x 128 weights, as V3 section "
        "3.3.2; it needs Transformer Engine 2.3 and a Hopper GPU. mxfp8: 32 values, on Blackwell.",
    )
    use_precision_aware_optimizer: bool = Field(
        False,
        description="Whether Adam updates the weights itself, from fp32 master weights that it holds, and may keep its moments in "
        "bf16 (megatron.exp_avg_dtype, megatron.exp_avg_sq_dtype), as V3 section 3.3.2 does. Needs Transformer Engine 2.4 and "
        "runtime.dtype=bf16.",
        json_schema_extra=MAY_CHANGE,
    )
    exp_avg_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of Adam's first moment. bf16 needs megatron.use_precision_aware_optimizer."
    )
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="Number format of Adam's second moment. bf16 needs megatron.use_precision_aware_optimizer."
    )
    optimizer_cpu_offload: bool = Field(
        False,
        description="Whether Adam's state stays on the host, where the update is made: gradients travel there in every update, "
        "and weights back. Needs CUDA, runtime.dtype=bf16, moments in fp32, and no optimizer in runtime.offload.",
        json_schema_extra=MAY_CHANGE,
    )
    optimizer_offload_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of a rank's parameters that megatron.optimizer_cpu_offload is for; the device updates the others.",
        json_schema_extra=MAY_CHANGE,
    )
    overlap_cpu_optimizer_d2h_h2d: bool = Field(
        False,
        description="Whether the host updates one tensor while gradients and weights of others travel. Needs "
        "megatron.optimizer_cpu_offload.",
        json_schema_extra=MAY_CHANGE,
    )
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = Field(
        "none",
        description="Who captures layers as CUDA graphs. transformer_engine: Transformer Engine 2.10 the parts of layers in "
        "megatron.cuda_graph_scope, after three updates without; local: Megatron-Core whole layers of a model without experts. "
        "Both need micro-batches of one shape: pretraining without pretrain.mask_documents.",
        json_schema_extra=MAY_CHANGE,
    )
    cuda_graph_scope: list[Literal["attn", "mlp", "moe_router"]] | None = Field(
        None,
        description="Parts of a layer that megatron.cuda_graph_impl=transformer_engine captures: attention, and mlp of layers "
        "without experts. Experts cannot be: their numbers of tokens vary; moe_router neither. null: attn.",
        json_schema_extra=MAY_CHANGE,
    )
