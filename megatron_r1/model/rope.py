"""Scaled rotary embeddings of config.json, read as transformers reads them.

Source: transformers' `modeling_rope_utils`. A key that is missing has the value that it has there; one that is unknown is refused
by its name, since nobody can say whether the model is right without it.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

#: Keys of any kind of scaling that say nothing about its numbers; transformers 5 writes the base of RoPE beside them.
_COMMON = {"type", "rope_type", "rope_theta"}
MOST_POSITIONS = 1 << 21  #: trained before scaling; a table of angles has as many rows


class YarnScaling(BaseModel):
    """YaRN (transformers' `_compute_yarn_parameters`): slow frequencies are divided by `factor`, sine and cosine grow a little."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rope_type: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0, le=1e4, allow_inf_nan=False)
    original_max_position_embeddings: int = Field(gt=0, le=MOST_POSITIONS)
    beta_fast: float = Field(32.0, gt=0, allow_inf_nan=False)
    beta_slow: float = Field(1.0, gt=0, allow_inf_nan=False)


class Llama3Scaling(BaseModel):
    """Frequencies lowered by wavelength (transformers' `_compute_llama3_parameters`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    rope_type: Literal["llama3"] = "llama3"
    factor: float = Field(8.0, gt=0, le=1e4, allow_inf_nan=False)
    low_freq_factor: float = Field(1.0, gt=0, allow_inf_nan=False)
    high_freq_factor: float = Field(4.0, gt=0, allow_inf_nan=False)
    original_max_position_embeddings: int = Field(8192, gt=0, le=MOST_POSITIONS)


def read_rope(config: dict[str, Any]) -> tuple[float | None, str, dict[str, Any]]:
    """Base of RoPE (None: not said), kind of scaling ("default": none) and the keys of the scaling, the base and kind left out.

    transformers 5 writes all of it as `rope_parameters`, earlier versions as `rope_theta` and `rope_scaling`. Positions before
    scaling are those of the whole config where it has them, and else `max_position_embeddings`.

    Raises:
        TypeError: no mapping.
        ValueError: two kinds or bases that contradict each other, or rotation of a part of every head.
    """
    parameters, scaling = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict):
            raise TypeError(f"{key} is {value!r}, not a mapping")
    bases = [part["rope_theta"] for part in (config, parameters, scaling) if part.get("rope_theta") is not None]
    if any(base != bases[0] for base in bases):
        raise ValueError(f"rope_theta is {bases[0]!r} and, in rope_parameters or rope_scaling, {bases[-1]!r}: keep the right one")
    scaling = scaling or parameters
    kinds = [scaling[key] for key in ("rope_type", "type") if scaling.get(key) is not None]
    if len(set(map(str, kinds))) > 1:
        raise ValueError(f"rope_scaling has the types {kinds[0]!r} and {kinds[1]!r}: keep the right one")
    kind = str(kinds[0]) if kinds else "default"
    part = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if part not in (None, 1):
        raise ValueError(f"partial_rotary_factor is {part!r}, only whole heads are rotated")
    if kind == "default":
        numbers = sorted(scaling.keys() - _COMMON - {"partial_rotary_factor"})
        if numbers:
            raise ValueError(f"rope_scaling has {', '.join(numbers)} but no rope_type that would use it: add the type, or drop it")
        return (bases[0] if bases else None), kind, {}
    numbers_of = {key: value for key, value in scaling.items() if key not in _COMMON | {"partial_rotary_factor"}}
    if kind in ("yarn", "llama3"):
        before = config.get("original_max_position_embeddings")
        if before is not None:
            numbers_of["original_max_position_embeddings"] = before
        elif numbers_of.get("original_max_position_embeddings") is None:
            numbers_of["original_max_position_embeddings"] = config.get("max_position_embeddings")
    return (bases[0] if bases else None), kind, numbers_of


def read_llama3(numbers: dict[str, Any]) -> dict[str, Any]:
    """Fields of `Llama3Scaling` from the keys of a config. Raises ValueError for keys that are missing or unknown."""
    known = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    _refuse_unknown(numbers, known, "llama3")
    return {"rope_type": "llama3", **{key: _require(numbers, key) for key in known}}


def read_yarn(numbers: dict[str, Any]) -> dict[str, Any]:
    """Fields of `YarnScaling`, and `mscale` and `mscale_all_dim` where the config sets both.

    Raises:
        ValueError: keys that are missing, unknown or that Megatron-Core and vLLM have no counterpart of.
    """
    fields = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    _refuse_unknown(numbers, (*fields, "mscale", "mscale_all_dim", "attention_factor", "truncate"), "yarn")
    if numbers.get("truncate", True) is not True:
        raise ValueError("rope_scaling.truncate is not true, which neither Megatron-Core's nor this project's YaRN has")
    read = {key: _require(numbers, key) for key in ("factor", "original_max_position_embeddings")}
    read |= {"beta_fast": numbers.get("beta_fast") or 32.0, "beta_slow": numbers.get("beta_slow") or 1.0}
    scales = {key: numbers.get(key) for key in ("mscale", "mscale_all_dim")}
    if all(scales.values()):
        read |= scales
    elif scales["mscale_all_dim"] or scales["mscale"] not in (None, 0, 1):
        # transformers then takes 1 for the missing one in sine and cosine, vLLM its own default, and they differ.
        said = " and ".join(f"{key}={value}" for key, value in scales.items())
        raise ValueError(f"rope_scaling has {said}: set both, or neither")
    _check_attention_factor(numbers.get("attention_factor"), read)
    return read


def yarn_growth(factor: float, mscale: float = 1.0) -> float:
    """By how much YaRN lets scores grow that the square of sine and cosine, or of the softmax's scale, multiplies."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _check_attention_factor(given: Any, read: dict[str, Any]) -> None:
    if given is None:
        return
    factor = read["factor"]
    numbers = (given, factor, read.get("mscale", 1), read.get("mscale_all_dim", 1))
    if not all(map(_is_plain_number, numbers)):
        raise ValueError(f"rope_scaling.attention_factor is {given!r}, not a number that YaRN's can be compared with")
    usual = yarn_growth(factor)
    if "mscale" in read:
        usual = yarn_growth(factor, read["mscale"]) / yarn_growth(factor, read["mscale_all_dim"])
    if not math.isclose(given, usual, rel_tol=1e-6):
        raise ValueError(f"rope_scaling.attention_factor is {given!r}, only YaRN's own {usual:.6g} for this factor is built")


def _is_plain_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(numbers: dict[str, Any], key: str) -> Any:
    if numbers.get(key) is None:
        raise ValueError(f"rope_scaling lacks {key}, which has no default")
    return numbers[key]


def _refuse_unknown(numbers: dict[str, Any], known: tuple[str, ...], kind: str) -> None:
    unknown = sorted(numbers.keys() - set(known))
    if unknown:
        raise ValueError(f"rope_scaling has {', '.join(unknown)}, which {kind} does not have: known are {', '.join(known)}")
