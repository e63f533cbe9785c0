"""LC205 unused-adapter-tensor

What it is
The adapter holds tensors that name nothing in BASE, so nobody can say where they should have gone.

How it happens
The adapter belongs to another architecture or another base.
The modules were renamed between training and merging, as vision-language models were in transformers 4.52
and 5.
The trainer wrapped the model and its own prefix stayed in the keys.

How it is told
By names alone, known renames taken into account. One rewriting of their keys is looked for after which all of
them name modules of BASE. A loader that is not strict drops these tensors without an error: what they were for then
holds the base (LC509).

Evidence
rewrite: the beginning of their keys and what BASE has in its place. closest: without it, for a few of them, the name
of BASE that looks most alike. unused: how many there are.

What to do
Rename the adapter's keys after the modules of BASE, or give the base that it was trained on.

Seen in
huggingface/transformers#38627, vllm-project/vllm#34186, illuin-tech/colpali#424, hiyouga/LlamaFactory#10294
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from lora_check.faults._findings import found, listed, many
from lora_check.faults._keys import module_of, modules_of, rewriting, said
from lora_check.types import Finding, Plan, PlanFault, Verdict

EXAMPLES = 3
_NUMBER = re.compile(r"\d+")
_FACTOR = re.compile(r"\.(?:lora_|token_adapter\.|modules_to_save\.).*")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every orphan."""
    if not plan.orphans:
        return ()
    names = list(dict.fromkeys(name for _, name in plan.orphans))
    message = f"{many(len(names), 'adapter tensor')} that {_name(names)} nothing in BASE: {listed(names, limit=2)}"
    if rewrite := rewriting({module_of(name) for name in names}, modules_of(plan)):
        told = f"{message}; all of them would with {said(rewrite)}"
        return (found(FAULT, told, names, unused=len(names), rewrite={rewrite[0] or "(none)": rewrite[1] or "(none)"}),)
    return (found(FAULT, message, names, unused=len(names), closest=_closest(names, plan)),)


def _name(names: list[str]) -> str:
    return "names" if len(names) == 1 else "name"


def _closest(names: Iterable[str], plan: Plan) -> dict[str, str]:
    """One orphan of each kind -> the base name most like it; names that differ in a number only are of one kind."""
    base = _kinds(pairing.base.name for pairing in plan.pairings if pairing.base)
    pairs: dict[str, str] = {}
    for name in list(_kinds(names).values())[:EXAMPLES]:
        wanted = _FACTOR.sub(".weight", name.removeprefix("base_model.model."))
        for kind in difflib.get_close_matches(_NUMBER.sub("0", wanted), base, n=1):
            pairs[name] = base[kind]
    return pairs


def _kinds(names: Iterable[str]) -> dict[str, str]:
    kinds: dict[str, str] = {}
    for name in names:
        kinds.setdefault(_NUMBER.sub("0", name), name)
    return kinds


FAULT = PlanFault(
    code="LC205",
    name="unused-adapter-tensor",
    severity="error",
    summary="adapter tensors that name nothing in BASE",
    help="rename the adapter's keys after the modules of BASE, or give the base that it was trained on",
    detect=detect,
    verdict=Verdict.INCONCLUSIVE,
    causes=("M02",),
)
