"""Settings of data curation: the section `curation`. "R1 v1" and "R1 v2" are DeepSeek-R1, arXiv 2501.12948v1 and v2."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import Section


class WriterConfig(EndpointConfig):
    """A served model that writes or rewrites data. The paper's is DeepSeek-V3 (R1 v2 B.3.2)."""

    temperature: float = Field(0.7, ge=0, description="Sampling temperature of the model that writes. The paper does not state it.")
    max_tokens: int = Field(
        16384, gt=0, description="Most tokens of one answer of the model that writes; an answer that is cut there is dropped."
    )


FilterName = Literal["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block", "markdown", "first_person"]


class FilterConfig(Section):
    """What data must be.

    The paper names these filters (R1 v1 section 2.3.3, R1 v2 B.3). Every threshold is ours: the paper states none.
    """

    names: list[FilterName] = Field(
        ["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block"],
        description="Filters that a record must pass, of well_formed, correct, language, repetition, long_paragraph, code_block, "
        "markdown and first_person. They are applied in this order; the last two are for cold-start data (R1 v2 B.3.2).",
    )
    verdict_domains: list[str] = Field(
        ["math", "code", "stem", "logic"],
        description="Domains whose records must bring a verdict for the filter correct; in the others a record without one passes.",
    )
    plain_domains: list[str] = Field(
        ["general"], description="Domains whose answers may have no reasoning, for the filter well_formed."
    )
    language_share: float = Field(
        0.9,
        gt=0,
        le=1,
        description="Least share of words in the record's language, in its reasoning and in its summary, for the filter language. "
        "The paper does not state it.",
    )
    repetition_ngram: int = Field(
        10, gt=0, description="Words of an n-gram for the filter repetition. The paper does not state it."
    )
    repeated_ngram_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Largest share of n-grams that stood in the answer before, for the filter repetition. The paper does not "
        "state it.",
    )
    repeated_line_share: float = Field(
        0.3,
        ge=0,
        le=1,
        description="Largest share of characters in lines that stood in the answer before, for the filter repetition. The paper "
        "does not state it.",
    )
    paragraph_words: int = Field(
        300,
        gt=0,
        description="Most words between two line breaks of the reasoning, for the filter long_paragraph. A Chinese character "
        "counts as a word. The paper does not state it.",
    )
    first_person_words: int = Field(
        40,
        gt=0,
        description="Words at the beginning of the reasoning of which one must be in the first person (I, we, my), for the filter "
        "first_person. The paper does not state it.",
    )


class DedupConfig(Section):
    """Near-duplicate removal by MinHash over word n-grams. The paper names neither method nor threshold."""

    enabled: bool = Field(True, description="Whether near-duplicates are removed; the first record of several alike ones stays.")
    text: Literal["conversation", "prompt"] = Field(
        "conversation", description="What is compared to find near-duplicates: whole conversations, or the user's turns alone."
    )
    ngram: int = Field(
        5, gt=0, description="Words of an n-gram of the comparison; a Chinese character counts as one. The paper does not state it."
    )
    permutations: int = Field(
        128,
        gt=0,
        description="Number K of hash functions. The similarity is known to about 1 / (2 sqrt(K)). The paper does not state it.",
    )
    threshold: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Estimated Jaccard similarity from which the later record is dropped. The paper does not state it.",
    )


class DecontaminationConfig(Section):
    """n-gram match against the evaluation sets (R1 v2 D.1)."""

    evaluation_sets: dict[str, str] = Field(
        {},
        description="File of each evaluation set by the set's name: .jsonl or .json, either of them gzipped or not, or .parquet. "
        "Empty: nothing is compared.",
    )
    fields: list[str] = Field(
        ["question", "problem", "prompt", "text"],
        description="Names of the field that holds the question in an item of a set; the first that the item has counts.",
    )
    ngram: int = Field(
        10,
        gt=0,
        description="Words in a row that must be alike for a match; a Chinese character counts as one. R1 v2 D.1 states 10.",
    )
    text: Literal["conversation", "prompt"] = Field(
        "conversation", description="What is compared with evaluation sets: whole conversations, or the user's turns alone."
    )


class MixConfig(Section):
    """Proportions of the domains.

    The paper's 800K are math 395285, code 211129, stem 10124, logic 10395, general 177812 (R1 v2 B.3.3).
    """

    proportions: dict[str, float] = Field(
        {},
        description="Weight of each domain in the mix, by the domain's name. Empty: all records are taken, in a new order. R1 v2 "
        "B.3.3 states numbers of samples, which serve as weights.",
    )
    total: int | None = Field(
        None,
        gt=0,
        description="Number of records of the mix. null: as many as curation.mix.sampling allows. R1 v2 B.3.3 states 804,745.",
    )
    sampling: Literal["down", "up"] = Field(
        "down",
        description="How the proportions are met. down: no record comes twice, so that the scarcest domain limits the mix; up: "
        "records of scarce domains are repeated. The paper does not state it.",
    )
    max_copies: int = Field(
        4, gt=0, description="Most copies of one record with curation.mix.sampling=up. A domain that needs more is an error."
    )


class ColdStartConfig(Section):
    """Long chains of thought for stage 1 (R1 v1 section 2.3.1, R1 v2 B.3.2)."""

    ways: list[Literal["few_shot", "direct", "zero"]] = Field(
        ["few_shot", "direct", "zero"],
        description="Where chains of thought come from. few_shot: a model that is shown worked examples; direct: a model that is "
        "asked for reflection and verification; zero: outputs of R1-Zero (R1 v1 section 2.3.1).",
    )
    samples_per_problem: int = Field(
        1, gt=0, description="Answers to each problem by few_shot, and as many by direct. The paper does not state it."
    )
    examples: str | None = Field(
        None, description="A .jsonl file of conversations that few_shot shows to the model. null: the built-in ones."
    )
    refine: Literal["served", "rules"] = Field(
        "served",
        description="How outputs of R1-Zero are cleaned. served: the model of curation.writer translates, rewrites and summarises "
        "them (R1 v2 B.3.2); rules: only their tags are changed.",
    )
    rewrite: bool = Field(
        True,
        description="Whether curation.cold_start.refine=served also rewrites the reasoning as a conversation in the first person "
        "(R1 v2 B.3.2).",
    )
    filters: FilterConfig = FilterConfig(
        names=["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block", "markdown", "first_person"]
    )
    zero_filters: list[FilterName] = Field(
        ["well_formed", "correct", "repetition"],
        description="Names of those of curation.cold_start.filters that an output of R1-Zero must pass before a model refines it.",
    )


class RejectionConfig(Section):
    """Rejection sampling from a policy (R1 v1 section 2.3.3, R1 v2 B.3.3: "multiple responses", "only the correct ones")."""

    samples_per_prompt: int = Field(
        4, gt=0, description="Responses sampled for each prompt. The paper says several, and states no number."
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="Sampling temperature of rejection sampling. The paper states 1.0 for cold-start data only (R1 v2 B.3.2).",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Probability mass that tokens are sampled from in rejection sampling. The paper does not state it.",
    )
    max_tokens: int = Field(
        32768, gt=0, description="Most tokens of a response in rejection sampling; a longer one is cut and dropped."
    )
    keep_per_prompt: int = Field(
        1, gt=0, description="Most accepted responses that are kept for one prompt. The paper does not state it."
    )
    choose: Literal["random", "shortest"] = Field(
        "random",
        description="Which of more accepted responses are kept: some drawn by the seed, or those with the fewest tokens. The "
        "paper does not state it.",
    )
    batch_prompts: int = Field(64, gt=0, description="Number of prompts that the engine is asked to answer in one call.")
    resample_batch: bool = Field(
        True,
        description="Whether an unfinished batch is sampled again as a whole after a kill, so that the result is that of a run "
        "never killed; what was kept of it stays. false: only its missing prompts are sampled, which is faster and gives other "
        "samples.",
    )
    answer_summary: str = Field(
        "{answer}",
        description="Summary that is made of an <answer> element in R1-Zero's template; {answer} stands for the element's content.",
    )


class NonReasoningConfig(Section):
    """Writing, factual questions, translation and the like: a model writes a chain of thought for some (R1 v1 section 2.3.3)."""

    cot_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the queries, without the simple ones, for which a model writes a chain of thought. The paper says "
        "some, and states no number.",
    )
    simple_words: int = Field(
        6,
        ge=0,
        description="Most words of a simple query such as 'hello', which gets no chain of thought. The paper does not state the "
        "number.",
    )


class CurationConfig(Section):
    """From samples to supervised data: filters, near-duplicates, decontamination, mixing."""

    inputs: list[str] = Field(
        [], description="Files of conversations to curate, .jsonl each, e.g. curation.inputs=[a.jsonl,b.jsonl]."
    )
    form: Literal["think", "special_token"] = Field(
        "think",
        description="How an answer holds its parts. think: <think>, reasoning, </think>, summary (R1 v2 Listing 3); special_token: "
        "reasoning and summary, each behind curation.special_token (R1 v1 section 2.3.1).",
    )
    special_token: str = Field(
        "|special_token|",
        min_length=1,
        description="Text that stands before reasoning and summary with curation.form=special_token.",
    )
    workers: int = Field(1, gt=0, description="Number of processes that read and check records.")
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    mix: MixConfig = MixConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    rejection: RejectionConfig = RejectionConfig()
    non_reasoning: NonReasoningConfig = NonReasoningConfig()
    writer: WriterConfig = WriterConfig()
