"""Print docs/diagnosis.md: each known way in which merges go wrong, the codes that tell it, the cases that show it.

PYTHONPATH=. python tests/diagnosis_table.py > docs/diagnosis.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lora_check import registry

CORPUS = Path(__file__).parents[1] / "fixtures" / "faults"
CAUSES = {
    "M01": "the merge step was never run: the output is the base",
    "M02": "adapter keys silently not matched: a prefix, a wrapper, a rename",
    "M03": "trained heads and embeddings (modules_to_save) dropped",
    "M04": "another base: another revision, stage or size",
    "M05": "experts left at the base while attention is merged",
    "M06": "tied embeddings: a trained head or embedding lost, or tied again on reload",
    "M07": "quantised again: a delta smaller than the quantisation step is lost",
    "M08": "an adapter file without usable tensors",
    "M09": "merged into the decoded 4-bit or 8-bit base in place of the 16-bit one, or the reverse",
    "M10": "wrong scale: alpha not divided by r, scale left out, alpha of zero",
    "M11": "rsLoRA ignored, or applied twice",
    "M12": "merged twice",
    "M13": "several stages: a later one merged without an earlier one",
    "M14": "fused and split projections mapped onto one another wrongly",
    "M15": "stale or duplicate shards, an index that disagrees with the files",
    "M16": "written with another model class",
    "M17": "a float8 base written raw: its scales not applied, or dropped",
    "M18": "experts of a fused 3-D LoRA packed in another order",
    "M19": "PiSSA, OLoRA, LoftQ: the adapter belongs to a residual base",
    "M20": "gate and up confused in a fused gate_up",
    "M21": "rounding of a right merge: most often a false alarm",
    "M22": "DoRA's magnitude not applied, or its norm taken of another weight",
    "M23": "delta transposed, or A and B laid out otherwise",
    "M24": "rank_pattern or alpha_pattern ignored",
    "M25": "merged in part: some families, layers or components",
    "M26": "a local base silently replaced by a copy from the hub",
    "M27": "a head or adapter initialised at random when it was merged",
    "M28": "delta added to a packed tensor, or the packed copy left stale",
    "M29": "rows of the vocabulary missing, or resized differently",
    "M30": "several adapters combined wrongly",
    "M31": "a GPTQ or AWQ base, into which nothing can be merged",
    "M32": "merged and unmerged: the base drifted",
    "M33": "the bias of lora_B added without its scale",
    "M34": "the scale of embeddings differs between merge and forward",
    "M35": "weights right, configuration or tokenizer files not",
    "M36": "the unmerged PEFT state dict saved as the merged model",
    "M37": "names changed by the exporter",
    "M38": "hyperparameters or targets written into the export script",
    "M39": "tensor parallel: the delta summed over ranks, or one rank's slice only",
    "M40": "experts numbered otherwise",
    "M41": "another adapter, or another training step of it",
    "M42": "a layer whose weight is used directly, past its adapter",
    "M43": "saved after unmerge, or compared through an alias",
    "M44": "tensors changed that no adapter touches",
    "M45": "stored in another dtype",
    "M46": "the weight of an adapter multiplied into both factors",
    "M47": "biases trained with the adapter dropped",
    "M48": "trained token rows ignored, or added in place of replaced",
    "M49": "convolutions merged wrongly",
    "M50": "target_parameters: one of several parameters left out",
    "M51": "tensors left on the meta device, shards not merged",
    "M52": "zero points of a quantised base changed in packed form",
    "M53": "NaN or infinity produced by the merge",
    "M54": "an extra copy of a tied head written",
    "M55": "bytes of the adapter read in another dtype",
    "M56": "rows of q and k permuted for another rotary layout",
    "M57": "factors that underflowed in fp16",
    "M58": "the comparison of outputs is at fault: sampling, template, quantised reload",
    "M59": "the base holds the delta of an adapter that was deleted",
    "M60": "a method that cannot be merged at all",
}
BESIDE_WEIGHTS = ("M34", "M35", "M42", "M43", "M58")
HEAD = """# Diagnosis

Sixty ways in which merges go wrong, as they are reported in public, and what is said of each. A code names what lies
in the files; where two causes write the same bits they share it, and its page (`python -m lora_check explain CODE`)
says how to tell them apart. Of {beside} the weights show nothing: the report tells their
circumstances. Each case lies under `fixtures/faults`, made by the tool that breaks the merge, and
`tests/test_corpus.py` demands its codes and words of the API and of the command line.

Made by `PYTHONPATH=. python tests/diagnosis_table.py`.
"""


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """'CODE/case' -> what is expected of it."""
    for file in sorted(CORPUS.glob("*/*/expected.json")):
        yield f"{file.parts[-3]}/{file.parts[-2]}", json.loads(file.read_text())


def codes_of(cause: str) -> list[str]:
    """The codes whose faults claim this cause."""
    return [code for code, fault in registry.load("faults").items() if cause in fault.causes]


def cases_of(cause: str) -> list[str]:
    """The cases of the corpus that are made by this cause."""
    return [name for name, expected in cases() if cause in expected["causes"]]


def table() -> list[list[str]]:
    """A row for each cause."""
    faults = registry.load("faults")
    return [
        [
            cause,
            said,
            "<br>".join(f"{code} {faults[code].name}" for code in codes_of(cause)),
            "<br>".join(cases_of(cause)),
        ]
        for cause, said in CAUSES.items()
    ]


def main() -> None:
    print(HEAD.format(beside=", ".join(BESIDE_WEIGHTS)))
    print(tabulate(table(), ["", "cause", "codes", "cases"], tablefmt="github"))
    listed = list(cases())
    print(f"\n{len(CAUSES)} causes, {len(registry.load('faults'))} codes, {len(listed)} cases.")


if __name__ == "__main__":
    main()
