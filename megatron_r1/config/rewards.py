"""Settings of the rewards: the section `reward`. "R1 v1" and "R1 v2" are DeepSeek-R1, arXiv 2501.12948v1 and v2."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.config.endpoint import EndpointConfig
from megatron_r1.config.section import MAY_CHANGE, MOST_SEED, Section
from megatron_r1.errors import ConfigError

SCORERS_OF_ACCURACY = ("math", "code", "choice")  #: the built-in scorers that a domain can name
#: names of metrics reward/<name> and of scorers, which no custom reward may have
RESERVED_NAMES = frozenset(
    {*SCORERS_OF_ACCURACY, "accuracy", "format", "language", "model", "length", "repetition", "mean", "outcome"}
)


class JudgeConfig(EndpointConfig):
    """A served model that grades answers (R1 v2 Listing 4)."""

    url: str | None = Field(
        None,
        description="Base URL of the judge's endpoint, e.g. http://localhost:8000/v1. It is needed if a judge grades anything.",
        json_schema_extra=MAY_CHANGE,
    )
    timeout_seconds: float = Field(
        120.0, gt=0, description="Seconds that one request to the judge may take as a whole.", json_schema_extra=MAY_CHANGE
    )
    retries: int = Field(
        4,
        ge=0,
        description="Further requests to the judge after one that failed or gave no valid verdict.",
        json_schema_extra=MAY_CHANGE,
    )
    concurrency: int = Field(
        16,
        gt=0,
        description="Most requests to the judge that are under way at the same time. The ranks that sample divide them, but each "
        "may send one.",
        json_schema_extra=MAY_CHANGE,
    )
    api_key_file: str | None = Field(
        None,
        description="File that holds the API key of the judge's endpoint. null: no key is sent.",
        json_schema_extra=MAY_CHANGE,
    )
    temperature: float = Field(
        0.0,
        ge=0,
        description="Sampling temperature of the judge. At 0, two of the four votes on a pair repeat the other two. The paper "
        "does not state it.",
    )
    max_tokens: int = Field(
        4096,
        gt=0,
        description="Most tokens of the judge's answer; an answer that is cut there gives no verdict. The paper does not state it.",
        json_schema_extra=MAY_CHANGE,
    )
    seed: int = Field(
        0,
        ge=-MOST_SEED,
        le=MOST_SEED,
        description="Seed that is sent with every request. Votes on a pair also draw from it which response comes first.",
    )
    json_schema: bool = Field(
        False,
        description="Whether the endpoint constrains the judge's answer to the JSON of a verdict. Leave it off for models that "
        "reason in their answer.",
    )
    cache: str | None = Field(
        None,
        description="File that keeps the judge's verdicts over runs. null: none are kept. Each rank that samples has its own: "
        "that of rank 8 of judge.sqlite is judge_00008.sqlite.",
        json_schema_extra=MAY_CHANGE,
    )


class MathRewardConfig(Section):
    """What counts as the same answer if mathematics leaves it open; the paper says only that the answer must be correct."""

    percent: Literal["unit", "hundredth", "either"] = Field(
        "either",
        description="What 50% equals. unit: 50, as in the references of GSM8K; hundredth: 0.5; either: both, but 0.5% is never "
        "0.5, nor 1% 1. The paper does not state it.",
    )
    units: Literal["optional", "required", "ignored"] = Field(
        "optional",
        description="How units are compared. optional: one side may lack its unit, but two different units disagree; required: "
        "both sides have the same or none; ignored: units do not count. The paper does not state it.",
    )
    rounding: int = Field(
        0,
        ge=0,
        description="Significant digits from which a rounded decimal agrees with a reference that no decimal writes exactly, such "
        "as 1/3 or pi. 0: never. The paper does not state it.",
    )
    list_order: Literal["any", "same"] = Field(
        "any",
        description="Whether the elements of a list without brackets may come in any order; those of a set always may. The paper "
        "does not state it.",
    )
    several_answers: Literal["agree", "last"] = Field(
        "agree",
        description="How a response with several boxes is judged. agree: each box must be correct; last: the last box counts. The "
        "paper does not state it.",
    )
    sentences: bool = Field(
        False,
        description="Whether the answer element may hold a sentence with the answer in a box. false: it holds the answer alone, as "
        "R1's format asks.",
    )


class CodeMostConfig(Section):
    """The most that a problem gets if its record asks for other limits than those of `reward.code`: a record is untrusted data."""

    cpu_seconds: float = Field(20.0, gt=0, description="Most seconds of CPU time for one test that a problem may set.")
    wall_seconds: float = Field(60.0, gt=0, description="Most seconds by the clock for one test that a problem may set.")
    memory_mb: float = Field(2048, gt=0, description="Most memory in MiB for one test that a problem may set.")
    output_mb: float = Field(64, gt=0, description="Most output in MiB for one test that a problem may set or need.")
    stack_mb: float = Field(512, gt=0, description="Largest stack in MiB of a C++ program that a problem may set.")
    recursion_depth: float = Field(1_000_000, gt=0, description="Deepest recursion of Python functions that a problem may set.")


class LanguageRewardConfig(Section):
    """What counts as a word of the reasoning; the paper says only that the share of target-language words is the reward."""

    min_words: int = Field(
        8,
        gt=0,
        description="Words that a reasoning is at least counted as. With fewer words, the missing ones are in no language. "
        "The paper does not state it.",
    )
    aside_words: float = Field(
        1.0,
        ge=0,
        description="Words of other languages, per word of prose, that code, formulas, addresses and identifiers may hold; more of "
        "them count as words of no language. Phrases count in any case. The paper does not state it.",
    )


class CodeRewardConfig(Section):
    """How programs are run against their tests.

    The paper names a compiler and test cases (R1 v2 section 2.2); all limits are ours. The record of a problem may set its own in
    "limits", by the same names, up to those of `reward.code.most`.
    """

    isolation: Literal["bubblewrap", "none_i_accept_untrusted_code_on_this_machine"] = Field(
        "bubblewrap",
        description="How programs are kept from the machine. bubblewrap: in namespaces of their own, and they are refused if the "
        "machine has none; the other value runs them without isolation.",
        json_schema_extra=MAY_CHANGE,
    )
    language: Literal["python", "cpp"] = Field("python", description="Programming language of a block of code that names none.")
    python: str = Field(
        "", description="Path of the Python interpreter that runs programs. Empty: the trainer's own.", json_schema_extra=MAY_CHANGE
    )
    packages: list[str] = Field(
        [],
        description="Folders of Python packages that programs may import, beside the standard library.",
        json_schema_extra=MAY_CHANGE,
    )
    cpu_seconds: float = Field(5.0, gt=0, description="CPU time in seconds that a program may use for one test.")
    wall_seconds: float = Field(
        15.0, gt=0, description="Time in seconds that one test may take by the clock, which catches programs that sleep."
    )
    memory_mb: int = Field(512, gt=0, description="Memory in MiB that a program may use in one test.")
    output_mb: float = Field(
        1,
        gt=0,
        description="Most MiB that a program may write in one test. Problems whose tests expect more than half of it get twice "
        "what they expect.",
    )
    stack_mb: float = Field(256, gt=0, description="Stack in MiB of a C++ program, which is part of its memory.")
    recursion_depth: int = Field(
        50_000, gt=0, description="Depth of recursion at which Python stops a program, unless the program sets its own."
    )
    most: CodeMostConfig = CodeMostConfig()
    program_seconds: float = Field(
        60.0,
        gt=0,
        description="Time in seconds, by the clock, in which the tests of a program must start; later ones are not run, and the "
        "program fails.",
    )
    float_tolerance: float | None = Field(
        None,
        description="Largest difference, absolute or relative to the expected value, at which a number agrees with an expected "
        "one that has a point or an exponent. Whole numbers must be equal. null: all must.",
    )
    stop_at_first_failure: bool = Field(
        False,
        description="Whether the tests after the first that fails are left out. The score is the same.",
        json_schema_extra=MAY_CHANGE,
    )
    partial_credit: bool = Field(
        False,
        description="Whether the score is the share of tests that a program passes. false: 1 if all pass, else 0, as in the paper.",
    )
    cpp_cache_mb: int = Field(
        1024,
        ge=0,
        description="Most MiB of compiled C++ programs and headers that are kept in the folder for temporary files. 0: none.",
        json_schema_extra=MAY_CHANGE,
    )

    @model_validator(mode="after")
    def _partial_credit_has_all_tests(self) -> Self:
        if self.partial_credit and self.stop_at_first_failure:
            raise ConfigError("reward.code.partial_credit=true needs all tests: set reward.code.stop_at_first_failure=false")
        return self


class CustomRewardConfig(Section):
    """A reward of one's own: a Python function that scores one response, see docs/how_to/reward.md."""

    name: str = Field(
        pattern=r"^[A-Za-z_][A-Za-z0-9_-]*$",
        description="Name of the reward: its metrics are reward/NAME and reward/outcome/NAME/ with an outcome.",
    )
    function: str = Field(
        description="Import path of the function as package.module:function. Python must find the module in the folder where the "
        "command is run, on PYTHONPATH or among the installed packages."
    )
    weight: float = Field(1.0, description="Weight of the score in the total reward. 0: the score is measured only.")
    prompts: Literal["all", "reasoning", "general"] = Field(
        "all", description="Kind of the prompts whose responses the function scores."
    )
    json_reference: bool = Field(
        False, description="Whether the function gets the problem's answer parsed from JSON. false: as text."
    )
    time_limit_seconds: float | None = Field(
        None,
        gt=0,
        description="Seconds that the function may take for one response, after which its process is killed. null: "
        "reward.time_limit_seconds.",
    )
    settings: dict[str, Any] = Field({}, description="Further arguments that the function is called with, by their names.")


class RewardConfig(Section):
    """Reasoning prompts: accuracy + format + language (R1 v2 equations 4, 7); general ones: model + format + language (8, 10)."""

    accuracy_weight: float = Field(
        1.0,
        description="Weight of the accuracy reward, 1 for a correct answer and 0 for a wrong one. R1 v2 equation 4 gives accuracy "
        "and format the same weight.",
    )
    format_weight: float = Field(
        1.0, description="Weight of the format reward, 1 for a response in the form of its template, else 0 (R1 v2 section 2.2)."
    )
    format: Literal["zero", "chat", "none", "custom"] | None = Field(
        None,
        description="Form that the format reward wants. zero: <think> and <answer> elements, as R1-Zero's template asks (R1 v1 "
        "Table 1); chat: <think> and a summary, as DeepSeek-R1 answers; custom: reward.format_pattern; none: no form is rewarded "
        "or measured. null: zero for data.template r1_zero, chat for r1_chat and r1_chat_think, none for tokenizer.",
    )
    format_pattern: str | None = Field(
        None,
        description="Regular expression that a whole response must match with reward.format=custom, the <think> that its prompt "
        "opened included. RE2's syntax, whose time is linear in the response: no lookaround, no backreferences; . matches line "
        "breaks, too.",
    )
    language_weight: float = Field(
        0.0,
        description="Weight of the language reward, the share of the reasoning's words that are in the prompt's language (R1 v2 "
        'equation 7). R1\'s RL stages take 1 ("directly adding it"). 0: it is not measured.',
    )
    model_weight: float = Field(
        1.0, description="Weight of the model's reward on general prompts. R1 v2 equation 10 adds it to the format reward."
    )
    model: Literal["none", "judge", "reward_models"] = Field(
        "none",
        description="What scores general prompts. judge: the served model of reward.judge; reward_models: reward.helpful_model "
        "and reward.safety_model (R1 v2 section 3.1); none: general prompts are an error.",
    )
    helpful_model: str | None = Field(
        None, description="Folder of the reward model for helpfulness, which scores the final summary (R1 v2 section 3.1)."
    )
    safety_model: str | None = Field(
        None, description="Folder of the reward model for safety, which scores the whole response (R1 v2 section 3.1)."
    )
    answer_location: Literal["answer_tag", "boxed", "hash"] = Field(
        "answer_tag",
        description="The only place in which an answer to mathematics counts. answer_tag: inside <answer>; boxed: inside "
        "\\boxed{}; hash: after ####.",
    )
    length_penalty_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the length penalty, which falls from 0 to -1 over the last tokens before "
        "reward.length_penalty_max_tokens. 0: off. From DAPO (arXiv 2503.14476 equation 13), not from R1.",
    )
    length_penalty_max_tokens: int = Field(
        32768, gt=0, description="Length of a response in tokens from which the whole length penalty applies."
    )
    length_penalty_cache_tokens: int = Field(
        4096, gt=0, description="Tokens before reward.length_penalty_max_tokens over which the length penalty grows from nothing."
    )
    repetition_penalty_weight: float = Field(
        0.0,
        ge=0,
        description="Weight of the repetition penalty, minus the share of a response's n-grams that stood in it before. 0: off. "
        "Ours.",
    )
    repetition_ngram: int = Field(20, gt=0, description="Tokens of an n-gram of the repetition penalty.")
    unscored_value: float = Field(
        0.0,
        description="Score of a reward component whose scorer gave none (error, timeout, unscorable). Such cases are counted in "
        "the metrics. The paper does not state it.",
    )
    max_unscorable_share: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Largest share of the problems of a file whose reference no scorer can read; with more, a run ends before it "
        "builds its models. 1: it never ends for that.",
        json_schema_extra=MAY_CHANGE,
    )
    workers: int | None = Field(
        None,
        gt=0,
        description="Number of scoring processes beside each rank that samples. null: as many as the cores of the node that its "
        "ranks leave free, at most 64, shared by those of its ranks that sample. Scores do not depend on it.",
        json_schema_extra=MAY_CHANGE,
    )
    time_limit_seconds: float = Field(
        20.0,
        gt=0,
        description="Seconds that one scorer may take for one response, after which its process is killed.",
        json_schema_extra=MAY_CHANGE,
    )
    code_time_limit_seconds: float = Field(
        300.0,
        gt=0,
        description="Seconds that the code scorer may take for all tests of one program, in place of reward.time_limit_seconds.",
        json_schema_extra=MAY_CHANGE,
    )
    worker_memory_bytes: int = Field(
        4 << 30,
        gt=0,
        description="Most address space in bytes of a scoring process, and of each of its children.",
        json_schema_extra=MAY_CHANGE,
    )
    worker_recycle_bytes: int = Field(
        1 << 30,
        gt=0,
        description="Resident memory in bytes above which a scoring process is replaced after its current response.",
        json_schema_extra=MAY_CHANGE,
    )
    math: MathRewardConfig = MathRewardConfig()
    language: LanguageRewardConfig = LanguageRewardConfig()
    code: CodeRewardConfig = CodeRewardConfig()
    judge: JudgeConfig = JudgeConfig()
    custom: list[CustomRewardConfig] = Field(
        [], description="Rewards of your own, each with name, function, weight and more, as docs/how_to/reward.md describes them."
    )
    domains: dict[str, str] = Field(
        {},
        description="Scorer of the accuracy of each domain's problems, by the domain's name: math, code, choice (a letter) or the "
        "name of one in reward.custom. The domains math, code and choice need no entry.",
    )

    @model_validator(mode="after")
    def _pattern_goes_with_custom(self) -> Self:
        if (self.format == "custom") != (self.format_pattern is not None):
            raise ConfigError("reward.format=custom and reward.format_pattern go together: set both, or none of the two")
        return self

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [custom.name for custom in self.custom]
        for custom in self.custom:
            key = f"reward.custom.{custom.name}"
            if custom.name in RESERVED_NAMES:
                raise ConfigError(f"{key}: the name is that of a built-in reward or scorer: choose another one")
            if names.count(custom.name) > 1:
                raise ConfigError(f"{key}: two custom rewards have this name: rename one")
            module, colon, function = custom.function.partition(":")
            if not (colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))):
                raise ConfigError(f"{key}.function={custom.function} is no import path: write package.module:function")
            if taken := {"prompt", "response", "reference", "cut"} & set(custom.settings):
                raise ConfigError(f"{key}.settings.{min(taken)} is an argument that every custom reward gets: rename it")
            if custom.name in self.domains.values() and "weight" in custom.model_fields_set and custom.weight != 1.0:
                raise ConfigError(
                    f"{key}.weight={custom.weight:g} has no effect, since reward.domains makes this reward the accuracy of a "
                    "domain: set reward.accuracy_weight"
                )
        for domain, scorer in self.domains.items():
            if scorer not in (*SCORERS_OF_ACCURACY, *names):
                known = ", ".join((*SCORERS_OF_ACCURACY, *names))
                raise ConfigError(f"reward.domains.{domain}={scorer} is no scorer of accuracy; there are {known}")
        return self
