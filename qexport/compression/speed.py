"""Which products become products of whole numbers: those that save most for what the model loses by them."""

from qexport.bundle import Bundle
from qexport.compression.checkpoint import Checkpoint
from qexport.compression.layers import Layer
from qexport.compression.products import Rounded, candidates, label_of
from qexport.compression.search import PROBE_FEEDS
from qexport.compression.trials import Measured, Trials, opened
from qexport.knapsack import Option, State, front, last_within

# Of what may be lost, the products may lose so much; the rest is left to the weights.
SHARE = 0.5
# An input is not eased where that spares less than this share of the squared error that all products make together.
PLAIN = 0.01


def rounded_products(
    bundle: Bundle, layers: list[Layer], probing: Trials, judging: Trials, most: float, library, store: Checkpoint, say
) -> tuple[Rounded, ...]:
    """As many products as lose SHARE of what may be lost at most, with the weights as they were.

    The error of the model's outputs is measured with the products of each input in whole numbers alone, eased and not.
    Squared errors and saved multiply-adds add up, so that the front of a knapsack orders them; how far along it the metric
    loses little enough is tried in the model.

    Args:
        probing, judging: trials of the model as it is, for the errors and for what is tried.
        most: loss of the metric that is allowed in the end.
        library: as in `qexport.runtime.session`.
        say: called with the step in words and the share that is done.
    """

    def measured(trials: Trials, rounded: tuple[Rounded, ...], feeds: int | None) -> Measured:
        def run():
            with opened(bundle, [], library, rounded=rounded) as session:
                return list(trials.of(session).measure({}, feeds).__dict__.values())

        return Measured(*map(float, store.compute(f"products on {feeds or 'all'} batches{label_of(rounded)}", run)))

    def alone(*rounded: Rounded) -> float:
        return measured(probing, rounded, PROBE_FEEDS).error ** 2

    def together(*rounded: Rounded) -> float:
        return measured(judging, rounded, None).loss

    groups, floor, errors = candidates(layers, store), alone(), []
    for number, group in enumerate(groups):
        say(f"rounding the inputs of {group.layers[0]}", number / (len(groups) + 4))
        errors.append([max(alone(way) - floor, 0.0) for way in (group, group.plain())])
    little = PLAIN * sum(eased for eased, _ in errors)
    places = []
    for group, (eased, plain) in zip(groups, errors, strict=True):
        way = (group.plain(), plain) if plain <= eased + little else (group, eased)
        places.append([Option((), group.saved, 0.0), Option((way[0],), 0.0, way[1])])
    say("trying products of whole numbers", len(groups) / (len(groups) + 4))
    before = together()
    limit = before + SHARE * (most - before)
    found = last_within(front(places), lambda state: together(*_chosen(state)) <= limit)
    return () if found is None else _chosen(found)


def _chosen(state: State) -> tuple[Rounded, ...]:
    return tuple(group for option in state.options for group in option.choice)
