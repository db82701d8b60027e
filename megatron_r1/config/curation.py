"""Settings of data curation: the section `curation`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import Section


class WriterConfig(EndpointConfig):
    """A served model that writes or rewrites data (the recipe's is DeepSeek-V3)."""

    temperature: float = Field(0.7, ge=0, description="not stated")
    max_tokens: int = Field(16384, gt=0, description="of one answer; one cut at the limit is no answer")


FilterName = Literal["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block", "markdown", "first_person"]


class FilterConfig(Section):
    """What data must be. The recipe names these filters (v1 section 2.3, v2 B.3); every threshold is ours: none is stated."""

    names: list[FilterName] = Field(
        ["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block"],
        description="those applied, always in the order of this list of all: well_formed, correct, language, repetition, "
        "long_paragraph, code_block, markdown, first_person (the last two are for cold-start data)",
    )
    verdict_domains: list[str] = Field(
        ["math", "code", "stem", "logic"], description="domains whose records must bring a verdict; elsewhere one may be missing"
    )
    plain_domains: list[str] = Field(["general"], description="domains whose answers may have no reasoning")
    language_share: float = Field(0.9, gt=0, le=1, description="of the words, in the reasoning and in the summary each")
    repetition_ngram: int = Field(10, gt=0, description="words of an n-gram")
    repeated_ngram_share: float = Field(0.2, ge=0, le=1, description="most n-grams that stood in the text before")
    repeated_line_share: float = Field(0.3, ge=0, le=1, description="most characters in lines that stood in the text before")
    paragraph_words: int = Field(
        300, gt=0, description="most words between two line breaks of the reasoning; a Chinese character counts"
    )
    first_person_words: int = Field(
        40, gt=0, description="words at the beginning of the reasoning of which one must be I, we, my, ..."
    )


class DedupConfig(Section):
    """Near-duplicate removal by MinHash over word n-grams; the recipe names neither n-gram nor threshold."""

    enabled: bool = True
    text: Literal["conversation", "prompt"] = Field("conversation", description="what is compared; prompt: the user's turns alone")
    ngram: int = Field(5, gt=0, description="words of a shingle; a Chinese character counts as one")
    permutations: int = Field(128, gt=0, description="hash functions; the similarity is known to about 1/(2 sqrt(of this))")
    threshold: float = Field(0.8, gt=0, le=1, description="estimated Jaccard similarity from which the later one is dropped")


class DecontaminationConfig(Section):
    """10-gram match against the evaluation sets (v2 D.1)."""

    evaluation_sets: dict[str, str] = Field(
        {}, description="name: file of the set (.jsonl, .json, either gzipped, .parquet); none: nothing is compared"
    )
    fields: list[str] = Field(
        ["question", "problem", "prompt", "text"], description="of an item: the first that it has holds its question"
    )
    ngram: int = Field(10, gt=0, description="words that match; a Chinese character counts as one")
    text: Literal["conversation", "prompt"] = Field("conversation", description="what is compared; prompt: the user's turns alone")


class MixConfig(Section):
    """Proportions of the domains. The recipe's 800K are math 395285, code 211129, stem 10124, logic 10395, general 177812."""

    proportions: dict[str, float] = Field({}, description="domain: weight; none: all records are taken, in a new order")
    total: int | None = Field(None, gt=0, description="records of the mix; null: as many as `sampling` allows")
    sampling: Literal["down", "up"] = Field(
        "down", description="down: no record comes twice, the scarcest domain limits the mix; up: scarce domains are repeated"
    )
    max_copies: int = Field(4, gt=0, description="of one record with sampling=up; a domain that needs more is an error")


class ColdStartConfig(Section):
    """Long chains of thought for stage 1 (v1 section 2.3.1, v2 B.3.2)."""

    ways: list[Literal["few_shot", "direct", "zero"]] = Field(
        ["few_shot", "direct", "zero"],
        description="few_shot: a model shown worked examples; direct: one asked for reflection and verification; zero: R1-Zero's outputs",
    )
    samples_per_problem: int = Field(1, gt=0, description="of few_shot and of direct; not stated")
    examples: str | None = Field(None, description="conversations shown for few_shot and rewrite, .jsonl; null: those built in")
    refine: Literal["served", "rules"] = Field(
        "served", description="how R1-Zero's outputs are cleaned; rules: only their tags are changed, no model is asked"
    )
    rewrite: bool = Field(True, description="with refine=served: rewrite the reasoning in conversational first person")
    filters: FilterConfig = FilterConfig(
        names=["well_formed", "correct", "language", "repetition", "long_paragraph", "code_block", "markdown", "first_person"]
    )
    zero_filters: list[FilterName] = Field(
        ["well_formed", "correct", "repetition"],
        description="of `filters`, those that an output of R1-Zero must pass before a model refines it",
    )


class RejectionConfig(Section):
    """Rejection sampling from a policy (v1 section 2.3.3, v2 B.3.3: "multiple responses", "only the correct ones")."""

    samples_per_prompt: int = Field(4, gt=0, description="not stated")
    temperature: float = Field(1.0, gt=0, description="not stated")
    top_p: float = Field(1.0, gt=0, le=1, description="not stated")
    max_tokens: int = Field(32768, gt=0, description="of a response")
    keep_per_prompt: int = Field(1, gt=0, description="accepted samples kept of one prompt, at most")
    choose: Literal["random", "shortest"] = Field("random", description="which of the accepted are kept; random: by the seed")
    batch_prompts: int = Field(64, gt=0, description="prompts asked of the engine at once")
    resample_batch: bool = Field(
        True,
        description="after a kill, sample an unfinished batch again as a whole (what is kept of it stays), so that the result is that of "
        "a run never killed; false: only its missing prompts, which saves time and gives other samples",
    )
    answer_summary: str = Field(
        "{answer}", description="the summary made of an <answer> element of R1-Zero's template; {answer} is what stands in it"
    )


class NonReasoningConfig(Section):
    """Writing, factual questions, translation, ...: a model writes a chain of thought for some (v1 section 2.3.3)."""

    cot_share: float = Field(0.5, ge=0, le=1, description="of the queries that are not simple; not stated")
    simple_words: int = Field(6, ge=0, description="a query of at most this many words, such as 'hello', gets no chain of thought")


class CurationConfig(Section):
    """From samples to supervised data: filters, near-duplicates, decontamination, mixing."""

    inputs: list[str] = Field([], description=".jsonl files of conversations, e.g. [a.jsonl, b.jsonl]")
    form: Literal["think", "special_token"] = Field(
        "think",
        description="of an answer: <think>, reasoning, </think>, summary; or reasoning and summary after special_token each (v1)",
    )
    special_token: str = Field("|special_token|", min_length=1, description="for form=special_token")
    workers: int = Field(1, gt=0, description="processes that read and check records")
    filters: FilterConfig = FilterConfig()
    dedup: DedupConfig = DedupConfig()
    decontamination: DecontaminationConfig = DecontaminationConfig()
    mix: MixConfig = MixConfig()
    cold_start: ColdStartConfig = ColdStartConfig()
    rejection: RejectionConfig = RejectionConfig()
    non_reasoning: NonReasoningConfig = NonReasoningConfig()
    writer: WriterConfig = WriterConfig()
