"""LC317 weight-used-directly

What it is
The adapter changes layers whose weight the model hands to a kernel, past the layer's own forward. In training the
adapter may never have acted there; in the merged model it does.

How it happens
The fused kernels of Mamba layers take x_proj.weight, dt_proj.weight, out_proj.weight and conv1d.weight themselves, and
a LoRA around the layer is not called. Newer releases of PEFT refuse out_proj and conv1d of some of these models.
nn.MultiheadAttention does the same with out_proj; PEFT wraps the whole module from 0.15 on, and earlier ones did not.

How it is told
By the names of the targets, model_type, and the in_proj_weight of a MultiheadAttention. Nothing in the files tells
whether the kernel was in use. The weights are checked by the formula of the merge.

Evidence
layers: the names of such layers.

What to do
Compare the outputs of the merged model with those of the adapter; if they differ, train without these targets.

Seen in
huggingface/peft#2274, huggingface/transformers#30316, huggingface/peft#1324, huggingface/peft#761
"""

from __future__ import annotations

from lora_check.faults._configs import model_types
from lora_check.faults._findings import found, listed, many
from lora_check.types import Finding, Pairing, Plan, PlanFault, Verdict

KERNELS = frozenset(
    {
        "bamba",
        "falcon_h1",
        "falcon_mamba",
        "granitemoehybrid",
        "jamba",
        "mamba",
        "mamba2",
        "nemotron_h",
        "zamba",
        "zamba2",
    }
)
"""The model types of transformers with a fused state-space kernel."""

MIXERS, LEAVES = ("mixer", "mamba"), ("x_proj", "dt_proj", "out_proj", "conv1d")


def detect(plan: Plan) -> tuple[Finding, ...]:
    """One finding with every such target."""
    mixers = not KERNELS.isdisjoint(model_types(plan.base_config))
    names = {one.merged.name: one.family for one in plan.targets if _of_attention(one) or (mixers and _of_mixer(one))}
    if not names:
        return ()
    layers = sorted(set(names.values()))
    message = (
        f"{many(len(names), 'target')} whose weight a kernel takes past the layer, so that the adapter may not have "
    )
    return (found(FAULT, f"{message}acted in training: {listed(layers)}", names, layers=layers),)


def _of_mixer(pairing: Pairing) -> bool:
    above, _, leaf = pairing.module.rpartition(".")
    return leaf in LEAVES and above.rpartition(".")[2] in MIXERS


def _of_attention(pairing: Pairing) -> bool:
    return any(step.site is not None and step.site.multihead for step in pairing.steps)


FAULT = PlanFault(
    code="LC317",
    name="weight-used-directly",
    severity="info",
    summary="targets whose weight a kernel takes past the layer",
    help="compare the outputs of the merged model with those of the adapter before it is trusted",
    detect=detect,
    verdict=Verdict.VERIFIED,
    causes=("M42",),
)
