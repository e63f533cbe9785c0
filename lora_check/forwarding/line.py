"""The line of a forward: check the weights, run three models, join what they say."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_check.errors import UsageError, WrongInputError
from lora_check.forwarding.differences import differences
from lora_check.forwarding.measures import pair, partings, perplexity
from lora_check.forwarding.nouns import Asked, Forward, Lockstep, Pair, Said
from lora_check.forwarding.prompts import Questions, asked
from lora_check.locations import Role, resolve
from lora_check.remote.place import is_url
from lora_check.rounding import FORMATS

if TYPE_CHECKING:
    from lora_check.forwarding.kinds import Kind
    from lora_check.means import Progress
    from lora_check.oracles.forward import Setting
    from lora_check.oracles.loading import Head
    from lora_check.report import Report

PAIRS = (("merged", "unmerged"), ("live", "unmerged"), ("merged", "live"), ("merged", "base"), ("unmerged", "base"))
"""`live` is PEFT's own merge of base and adapters, in memory: what an honest merge moves."""


def forward(
    base: str,
    adapters: Sequence[str],
    merged: str,
    wanted: Questions,
    *,
    weights: Sequence[float] | None = None,
    combination: str | None = None,
    tokens: int = 24,
    dtype: str = "stored",
    device: str = "cpu",
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Forward:
    """Check the weights, then let base, unmerged and merged answer the same questions.

    weights, combination   as `report` has them: of the adapters, before they are merged
    tokens   how many each goes on after a prompt          dtype   "stored", or "float32": what they are computed in
    raises   LoraCheckError: an input that cannot be read or run
    """
    from lora_check.oracles.attaching import Together, demand_combination
    from lora_check.oracles.forward import demand_libraries, spoken
    from lora_check.oracles.loading import encoder, head, limits
    from lora_check.pipeline import check

    began = time.monotonic()
    demand_libraries(device)
    places = _folder(base, "base"), [_folder(one, "adapter") for one in adapters], _folder(merged, "merged")
    together = Together(weights=tuple(weights or [1.0] * len(adapters)), combination=combination)
    demand_combination(together)
    run_as = head(places[0], places[2])
    context, vocabulary = limits(run_as)
    differences(places[0], places[2])  # damaged files are told before anything is run
    encode, decode = encoder(places[0])
    asking = asked(wanted, encode, context=context, vocabulary=vocabulary, tokens=tokens, kind=run_as.kind)
    how: dict[str, Any] = {"weights": weights, "combination": combination, "jobs": jobs, "progress": progress}
    report = check(base, list(adapters), merged, command="forward", **how)
    setting = _setting(report, *places, head=run_as, together=together, dtype=dtype, device=device, tokens=tokens)
    said, lockstep = spoken(setting, asking)
    found = _joined(report, setting, asking, said, lockstep, decode)
    tokenizers = _tokenizers(wanted, encode, encoder(places[2])[0])
    return replace(found, remarks=(*found.remarks, *tokenizers), seconds=time.monotonic() - began)


def _joined(
    report: Report,
    setting: Setting,
    asking: tuple[Asked, ...],
    said: Mapping[str, Said],
    lockstep: Lockstep,
    decode: Callable[[Sequence[int]], str],
) -> Forward:
    """What the files say and what the models say, side by side."""
    run_as, kind = setting.head, setting.head.kind
    parted = partings(said["merged"], said["unmerged"], rounding=lockstep.answer == "agrees")
    return Forward(
        report=report,
        kind=kind,
        asked=asking,
        said=said,
        pairs=tuple(_pairs(said, kind)),
        perplexities={name: perplexity(one, asking) for name, one in said.items() if kind.talks},
        partings=parted,
        lockstep=lockstep,
        weights=_weights(report, lockstep),
        differences=differences(setting.base, setting.merged, alike=run_as.alike),
        remarks=(*_cuts(asking), *run_as.remarks, *_silent(run_as, setting.tokens), *_of_models(said)),
        circumstances=_circumstances(setting, said),
        spoken={name: tuple(decode(ids) for ids in one.new) for name, one in said.items() if one.new},
        tokens={token: decode([token]) for one in parted for token in one.tokens if token is not None},
        seconds=0.0,
    )


def _folder(location: str, role: Role) -> Path:
    """A local folder, or the cached one of a hub id."""
    if is_url(location):
        raise UsageError(f"forward runs local folders, not the URL {location}", hint="report and merge read URLs")
    found = resolve(location, role=role)
    if not found.is_dir():
        raise WrongInputError(f"{role}: forward runs whole folders, and {location} is a file", hint="name its folder")
    return found


def _setting(report: Report, base: Path, adapters: Sequence[Path], merged: Path, *, dtype: str, **more: Any) -> Setting:
    """All models in the dtype that MERGED is stored in, the widest of several, so that loading rounds nothing of it."""
    from lora_check.oracles.forward import Setting

    ours, theirs = (_floats(one) for one in (report.run.base, report.run.merged))
    modelled = bool(theirs) and all(one in FORMATS for one in theirs)
    coarsest = max(theirs, key=lambda one: FORMATS[one].unit) if modelled else ""
    return Setting(
        base=base,
        adapters=tuple(adapters),
        merged=merged,
        dtype=_widest([one for one in theirs if one in FORMATS]) if dtype == "stored" else dtype,
        storage=coarsest,
        narrower=bool(coarsest) and any(_rounds(one, coarsest) for one in ours if one in FORMATS),
        **more,
    )


def _rounds(dtype: str, into: str) -> bool:
    """Whether some value of a dtype is none of the other: that has fewer digits or, as fp16 has, fewer powers of 2."""
    ours, theirs = FORMATS[dtype], FORMATS[into]
    return theirs.unit > ours.unit or theirs.least_exponent - theirs.precision > ours.least_exponent - ours.precision


def _floats(described: Mapping[str, Any]) -> list[str]:
    """The floating dtypes of a checkpoint, as torch names them."""
    return [str(one) for one in described["dtypes"] if "float" in str(one)]


def _widest(known: Sequence[str]) -> str:
    """The dtype that holds every value of these; fp16 and bf16 together need fp32."""
    names = set(known)
    if not names or names == {"float16", "bfloat16"}:
        return "float32"
    return min(names, key=lambda one: FORMATS[one].unit)


# ------------------------------------------------------------------------------------------------------ joined


def _pairs(said: Mapping[str, Said], kind: Kind) -> Iterator[Pair]:
    """Each two models; none with a base that has no head of its own."""
    for one, other in PAIRS:
        if not (other == "base" and said["base"].brought):
            yield pair((one, other), said[one], said[other], kind)


def _silent(run_as: Head, tokens: int) -> list[str]:
    """What is not asked of models of this kind."""
    kind, name = run_as.kind, run_as.loader.__name__
    left = "no continuations, no perplexity" if tokens else "no perplexity"
    return [] if kind.talks else [f"{left}: {name} {kind.does}, and the text is one more sequence for it"]


def _of_models(said: Mapping[str, Said]) -> list[str]:
    """What loading made up and left out, and answers that are no numbers."""
    lines = [line for one in said.values() for line in (*one.invented, *one.remarks)]
    nan = {name: sum(bool(each.isnan().any()) for each in one.logits) for name, one in said.items()}
    spoilt = [
        f"{name} answers NaN to {count} of {len(said[name].logits)} sequences" for name, count in nan.items() if count
    ]
    return list(dict.fromkeys([*lines, *spoilt]))


def _weights(report: Report, lockstep: Lockstep) -> dict[str, tuple[str, ...]]:
    """Departing module -> what the check of the weights says of its tensors: verdict, codes."""
    return {one.place: _of_module(report, one.place) for one in lockstep.departures}


def _of_module(report: Report, module: str) -> tuple[str, ...]:
    """Its own tensors, under the name that the files give it."""
    names = {one.tensor for one in report.comparisons if _is_of(one.tensor.rpartition(".")[0], module)}
    if not names:
        return ()
    verdicts = [one.verdict for one in report.comparisons if one.tensor in names]
    codes = [one.code for one in report.findings if one.severity == "error" and names & set(one.tensors)]
    codes += [one.code for one in report.comparisons if one.tensor in names and one.code]
    return (max(verdicts, key=lambda one: one.rank).value, *dict.fromkeys(codes))


def _is_of(tensor: str, module: str) -> bool:
    """Names in memory and in files may differ by what stands in front."""
    return tensor == module or (bool(tensor) and (tensor.endswith(f".{module}") or module.endswith(f".{tensor}")))


def _cuts(asking: Sequence[Asked]) -> list[str]:
    return [
        f"sequence {place} is cut to its first {len(one.ids)} tokens, {one.cut} more do not fit the context"
        for place, one in enumerate(asking, start=1)
        if one.cut
    ]


def _tokenizers(wanted: Questions, ours: Callable[[str], Any] | None, theirs: Callable[[str], Any] | None) -> list[str]:
    """Whether MERGED's own tokenizer would have given the models other tokens."""
    if wanted.ids or ours is None or theirs is None:
        return [] if wanted.ids or theirs else ["MERGED has no tokenizer; that of BASE was used for all"]
    other = [one for one in (*wanted.prompts, wanted.text) if list(ours(one)) != list(theirs(one))]
    return [f"MERGED's tokenizer encodes {len(other)} of the prompts otherwise; BASE's was used for all"] * bool(other)


def _circumstances(setting: Setting, said: Mapping[str, Said]) -> dict[str, str]:
    from lora_check.forwarding.differences import sampled
    from lora_check.oracles.forward import PADDING

    kinds = {
        key: dict.fromkeys(one.circumstances.get(key, "") for one in said.values()) for key in ("class", "attention")
    }
    ignored = sampled(setting.base, setting.merged)
    kind, together = setting.head.kind, setting.together
    weighted = any(one != 1 for one in together.weights)
    return {
        **({"adapters": f"combined by {together.combination}"} if together.combination else {}),
        **({"weights": " ".join(f"{one:g}" for one in together.weights)} if weighted else {}),
        "dtype": setting.dtype + (", to which BASE is rounded" if setting.narrower else ""),
        "device": setting.device,
        "padding": PADDING,
        **({"sampling": f"off; ignored: {', '.join(ignored)}" if ignored else "off"} if kind.talks else {}),
        **{key: ", ".join(filter(None, names)) for key, names in kinds.items()},
    }
