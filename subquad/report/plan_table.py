"""A plan in the terminal: layers from left to right, heads from top to bottom, a letter and a colour for each mixer.

The colours are those of the pictures (plots.py). Where there are none (a pipe, a file, NO_COLOR) the letters say it
all; everything is plain ASCII.
"""

from string import ascii_uppercase

from rich.console import Console
from rich.table import Table
from rich.text import Text

from subquad.mixers import mixer_options
from subquad.plan import Plan
from subquad.report.console import make_table
from subquad.report.plots import mixer_colours
from subquad.utils import format as fmt

CONTEXTS = (2048, 8192, 32768, 131072)  # tokens of context that the bytes of caches are given for
LITTLE = 0.9  # share of the cache at the longest context above which a plan saves little
LABEL = 8  # columns before the first layer
TICK = 5  # layers between two numbers above the picture


def print_plan(plan: Plan, console: Console, dtype: str = "float32") -> None:
    """Prints the picture, what the mixers are, and the bytes of one sequence's cache, keys and values in `dtype`.

    Raises UserError for a dtype that is not a floating point one.
    """
    caches = _caches(plan, dtype)
    for line in _picture(plan, console.width):
        console.print(line, no_wrap=True)
    if plan.join == "parallel":
        console.print("\nWhere a layer has both, attention is a second branch beside the other mixer.")
    for table in (_legend(plan), caches):
        console.print()
        console.print(table)


def _picture(plan: Plan, width: int) -> list[Text]:
    """Lines of the picture, in several bands where `width` columns are too few for all layers."""
    table, colours, letters = plan.head_table(), mixer_colours(plan), _letters(plan)
    cell = 2 if LABEL + 2 * len(table) <= width else 1
    band = max(TICK, (width - LABEL) // cell // TICK * TICK)
    if _by_layer(plan):
        rows = {"": [heads[0] for heads in table]}
    else:
        head_count = max(map(len, table))
        rows = {
            f"head {head}": [heads[head] if head < len(heads) else "" for heads in table] for head in range(head_count)
        }
    lines = []
    for first in range(0, len(table), band):
        stop = min(first + band, len(table))
        ticks = "".join(f"{layer:<{TICK * cell}}" for layer in range(first, stop, TICK))
        lines.append(Text(f"{'layer':<{LABEL}}{ticks}".rstrip()))
        for label, mixers in rows.items():
            line = Text(f"{label:<{LABEL}}")
            for mixer in mixers[first:stop]:
                style = f"bold #ffffff on {colours[mixer]}" if mixer else ""
                line.append(f"{letters.get(mixer, ''):<{cell}}", style)
            lines.append(line)
    return lines


def _by_layer(plan: Plan) -> bool:
    """Whether the heads of every layer agree."""
    return all(len(layer) == 1 for layer in plan.layers)


def _letters(plan: Plan) -> dict[str, str]:
    """A letter for every mixer that the plan uses: the first of its name that no other has."""
    letters: dict[str, str] = {}
    for mixer in mixer_colours(plan):
        wishes = [letter for letter in mixer.upper() + ascii_uppercase if letter in ascii_uppercase]
        letters[mixer] = next(letter for letter in wishes if letter not in letters.values())
    return letters


def _legend(plan: Plan) -> Table:
    colours, letters, by_layer = mixer_colours(plan), _letters(plan), _by_layer(plan)
    counts = ["layers"] if by_layer else ["whole layers", "heads"]
    table = make_table(None, ["", "mixer", *counts], words=(0, 1))
    table.add_column("options")  # the longest of all: it wraps
    for name, letter in letters.items():
        groups = [layer[name] for layer in plan.layers if name in layer]
        whole = sum(list(layer) == [name] for layer in plan.layers)
        options = mixer_options(name, plan.mixers[name]).model_dump(exclude_none=True)
        table.add_row(
            Text(f" {letter} ", f"bold #ffffff on {colours[name]}"),
            name,
            fmt.integer(whole),
            *([] if by_layer else [fmt.integer(sum(map(len, groups)))]),
            Text(", ".join(f"{key} {value}" for key, value in options.items())),
        )
    return table


def _caches(plan: Plan, dtype: str) -> Table:
    table = make_table(f"Cache of one sequence, {dtype}", ["tokens of context", *map(fmt.context, CONTEXTS)])
    plans = {"this plan": plan, "all attention": Plan.all_attention(plan.shapes)}
    for name, row in plans.items():
        sizes = [row.cache_bytes(context, dtype=dtype) for context in CONTEXTS]
        table.add_row(name, *(fmt.plain(fmt.size(size)) for size in sizes))
    shares = cache_shares(plan, dtype).values()
    table.add_row("share", *(fmt.plain(fmt.percent(share)) for share in shares), style="bold")
    return table


def cache_shares(plan: Plan, dtype: str) -> dict[int, float]:
    """Share of the cache of all attention that a plan's cache takes, by tokens of context."""
    whole = Plan.all_attention(plan.shapes)
    return {
        context: plan.cache_bytes(context, dtype=dtype) / whole.cache_bytes(context, dtype=dtype)
        for context in CONTEXTS
    }


def saving_warning(plan: Plan, dtype: str) -> str:
    """Sentence on the contexts at which a plan saves no cache, or little even at the longest; empty if it does."""
    shares = cache_shares(plan, dtype)
    without_gain = [context for context, share in shares.items() if share >= 1]
    longest = fmt.context(CONTEXTS[-1])
    if len(without_gain) == len(shares):
        return f"warning: this plan saves no cache at any context up to {longest} tokens"
    if shares[CONTEXTS[-1]] > LITTLE:
        share = fmt.percent(shares[CONTEXTS[-1]])
        return f"warning: this plan saves little: at {longest} tokens of context its cache is {share} of the teacher's"
    if without_gain:
        return f"warning: this plan saves no cache at {fmt.context(max(without_gain))} tokens of context and below"
    return ""
