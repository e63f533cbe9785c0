"""A forward as text for a terminal, and as markdown; the weights stand below as `report` tells them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from tabulate import tabulate

from lora_check.forwarding import words as said
from lora_check.forwarding.kinds import Kind
from lora_check.forwarding.nouns import Forward, Pair
from lora_check.renderers import _words as words
from lora_check.report import Style

COLOURS = {"verified": "32", "refuted": "31", "inconclusive": "33"}
PROMPTS_SHOWN = 2
PARTINGS_SHOWN = 3
LONGEST = 76
FINDINGS_SHOWN = 4


def text(found: Forward, style: Style) -> str:
    """One screen: the verdict, why, the numbers, what the models say; with `all` every module and prompt."""
    head = said.sentence(found)
    if style.colour:
        head = f"\x1b[{COLOURS[found.verdict.value]}m{head}\x1b[0m"
    rows = _pairs(found)
    align = ("left", *["right"] * (len(rows[0]) - 1))
    table = tabulate(rows, headers="keys", disable_numparse=True, colalign=align)
    notes = "\n".join(f"note: {words.plain(one)}" for one in said.reasons(found))
    blocks = [head, _block(_departed(found, style)), notes, table, _block([said.scale(found)])]
    blocks += [_perplexities(found), _block(_partings(found, style)), *_spoken(found, style)]
    blocks += [_block(_findings(found, style)), _circumstances(found)]
    return "\n\n".join(filter(None, blocks)) + "\n"


def markdown(found: Forward, style: Style) -> str:
    """The same as a comment or a model card shows it."""
    rows = tabulate(_pairs(found), headers="keys", tablefmt="github", disable_numparse=True)
    lists = [_departed(found, style), said.reasons(found), _partings(found, style), _findings(found, style)]
    told = ["\n".join(f"- {words.escaped(line)}" for line in lines) for lines in lists]
    head, scale = f"### {words.escaped(said.sentence(found))}", words.escaped(said.scale(found))
    talk = [f"{_fence(block)}text\n{block}\n{_fence(block)}" for block in _spoken(found, style)]
    last = [words.escaped(_perplexities(found)), *told[2:3], *talk, told[3], words.escaped(_circumstances(found))]
    return "\n\n".join(filter(None, [head, *told[:2], rows, scale, *last])) + "\n"


def _fence(block: str) -> str:
    """Longer than any run of backticks inside."""
    ticks = max((len(run) for run in "".join(c if c == "`" else " " for c in block).split()), default=0)
    return "`" * max(3, ticks + 1)


def _block(lines: Sequence[str]) -> str:
    return "\n".join(words.plain(line) for line in lines)


def _departed(found: Forward, style: Style) -> list[str]:
    every = said.departures(found)
    shown = every if style.all else every[: said.MODULES_SHOWN]
    rest = [f"and {words.many(len(every) - len(shown), 'module')} more depart"] if len(every) > len(shown) else []
    return [*(f"{said.departure(one)}; {said.weight_of(found, one)}" for one in shown), *rest]


def _pairs(found: Forward) -> list[Mapping[str, str]]:
    return [
        {
            "one, the other": f"{one.one}, {one.other}",
            **_chances(one, found.kind),
            "same bits": "yes" if one.exact else "no",
        }
        for one in found.pairs
    ]


def _chances(one: Pair, kind: Kind) -> dict[str, str]:
    """The columns between; of answers that are no distribution only the largest difference."""
    largest = {f"max {kind.of} diff": f"{one.logit_max:.3g}"}
    if one.kl_mean is None or one.kl_max is None or one.agreement is None:
        return largest
    kl = {"KL mean": f"{one.kl_mean:.3g}", "KL max": f"{one.kl_max:.3g}"}
    return {**kl, **largest, f"same top {kind.top} %": f"{100 * one.agreement:.1f}"}


def _perplexities(found: Forward) -> str:
    told = [f"{name} {value:.5g}" for name, value in found.perplexities.items() if value is not None]
    what = "second half of the text after the first" if found.kind.splits else "text"
    return f"perplexity of the {what}: {', '.join(told)}" if told else ""


def _partings(found: Forward, style: Style) -> list[str]:
    shown = found.partings if style.all else found.partings[:PARTINGS_SHOWN]
    rest = len(found.partings) - len(shown)
    lines = [said.parting(found, one) for one in shown]
    return [*([told] if (told := said.same(found)) else []), *lines, *([f"and {rest} more part"] if rest else [])]


def _spoken(found: Forward, style: Style) -> Iterator[str]:
    """What the models say, side by side; first where they part."""
    order = sorted(range(len(found.asked)), key=lambda place: place not in {one.sequence for one in found.partings})
    talking = [place for place in order if found.asked[place].goes_on and found.spoken]
    for place in talking if style.all else talking[:PROMPTS_SHOWN]:
        one = found.asked[place]
        lines = [f"prompt {place + 1}: {_short(one.text or ' '.join(map(str, one.ids)), style)}"]
        yield "\n".join([*lines, *(f"  {name:<9} {_short(new[place], style)}" for name, new in found.spoken.items())])


def _short(text_: str, style: Style) -> str:
    plain = words.plain(text_)
    return plain if style.all or len(plain) <= LONGEST else f"{plain[: LONGEST - 3]}..."


def _findings(found: Forward, style: Style) -> list[str]:
    every = words.by_severity(found.report.findings)
    shown = every if style.all else every[:FINDINGS_SHOWN]
    lines = [f"{one.severity}[{one.code}] {one.name}: {words.plain(one.message)}" for one in shown]
    rest = [f"and {words.many(len(every) - len(shown), 'finding')} more"] if len(every) > len(shown) else []
    return [*lines, *rest, f"weights {words.totals(found.report)}"]


def _circumstances(found: Forward) -> str:
    told = [f"{key} {words.plain(value)}" for key, value in found.circumstances.items()]
    size = sum(len(one.ids) for one in found.asked)
    return f"{', '.join(told)}; {words.many(len(found.asked), 'sequence')}, {size} tokens, {found.seconds:.1f} s"
