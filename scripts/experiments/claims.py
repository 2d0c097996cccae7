"""The paper's claims as experiments: which points each needs, and what is compared with what."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from experiments.jobs import AUXILIARY, BASE, NOUN, Job, SweepConfig, training_of
from ldm.util import UserError

ABLATIONS = {"no masks": "no_mask", "no entire prompt": "no_full_prompt", "no deep aggregation": "last_layer",
             "no shared weights": "base_weights"}


CHOSEN = "lambda chosen"     # the label of a line whose images are picked from the others'


@dataclass(frozen=True)
class Line:
    """Points that belong together, in order; one point is a line too.

    Attributes:
        points: jobs without a concept.
        marks: what each point is, as plots say it.
        baseline: label of the line that this one is compared with.
    """

    label: str
    points: tuple[Job, ...]
    marks: tuple[str, ...]
    baseline: str | None = None

    @property
    def names(self) -> list[str]:
        """Names of the points in tables."""
        return [f"{self.label}, {mark}".removesuffix(", ") for mark in self.marks]


@dataclass(frozen=True)
class Claim:
    """A named experiment.

    Attributes:
        source: figure or section of the paper.
        question: what it decides.
        lines: its points, for a sweep's configuration.
        masks: whether DBIM's masks are drawn too.
        chosen: whether a line is added whose lambda the program chooses among the others' strengths.
    """

    name: str
    source: str
    question: str
    lines: Callable[[SweepConfig], list[Line]]
    masks: bool = False
    chosen: bool = False


def _alone(label: str, job: Job, baseline: str | None = None) -> Line:
    """A line of one point."""
    return Line(label, (job,), ("",), baseline)


def _chosen(config: SweepConfig, strength: float | None, *settings: str, words: str | None = None) -> Job:
    """The model that claims about sampling use, drawn in some way."""
    return Job("", config.method, config.step, strength, settings, words)


def _raw(config: SweepConfig, baseline: str | None = None) -> Line:
    """That model drawn as it is."""
    return _alone("raw model", _chosen(config, None), baseline)


def _curve(config: SweepConfig, label: str, method: str, strength: float | None = None, *settings: str,
           baseline: str | None = None) -> Line:
    """A line over fine-tuning steps."""
    points = tuple(Job("", method, step, strength, settings) for step in config.steps)
    marks = tuple(f"{step} steps" for step in config.steps)
    return Line(label, points, marks, baseline)


def _over(config: SweepConfig, label: str, strength: float, key: str, values: Sequence[float]) -> Line:
    """A line over the values of a sampling setting, compared with the raw model."""
    points = tuple(_chosen(config, strength, f"{key}={value}") for value in values)
    return Line(label, points, _numbers(values), "raw model")


def _numbers(values: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{value:g}" for value in values)


def schemes(config: SweepConfig) -> list[str]:
    """Returns the methods that make curves."""
    return list(config.methods if config.schemes is None else config.schemes)


def like_with_like(config: SweepConfig, names: Iterable[str]) -> dict[str, str]:
    """Pairs each ICO scheme with the manual template of as many concept words: their number alone moves curves."""
    optimized, manual = {}, {}
    for name in names:
        method = training_of(config, name).method
        if method.prefix or method.suffix:
            optimized[name] = len(method.words)
        else:
            manual[len(method.words)] = name
    return {name: manual[words] for name, words in optimized.items() if words in manual}


def tradeoff(config: SweepConfig) -> list[Line]:
    """Curves over fine-tuning steps, without DCI."""
    baselines = like_with_like(config, schemes(config))
    return [_curve(config, name, name, baseline=baselines.get(name)) for name in schemes(config)]


def sweep(config: SweepConfig) -> list[Line]:
    """All that is configured: every scheme over its steps, plain and with DCI at each lambda."""
    lines = tradeoff(config) if config.plain else []
    for name, strength in product(schemes(config), config.strengths):
        baseline = name if config.plain else None
        lines.append(_curve(config, f"{name} + DCI, lambda {strength:g}", name, strength, baseline=baseline))
    return lines


def dci(config: SweepConfig) -> list[Line]:
    """DCI with fewer steps, so that its U-Net work equals the raw model's."""
    steps = () if config.work_steps is None else (f"steps={config.work_steps}",)
    return [_curve(config, "raw model", config.method, None, *steps),
            _curve(config, f"+ DCI, lambda {config.strength:g}", config.method, config.strength, *steps,
                   "dci.match_cost=true", baseline="raw model")]


def methods(config: SweepConfig) -> list[Line]:
    """The manual template, ICO and ICO with DCI after the same steps, on the same prompts and seeds."""
    template = like_with_like(config, config.methods).get(config.method)
    lines = []
    if template is not None:            # no template may have as many words
        lines.append(_alone(template, Job("", template, config.step)))
    return [*lines, _alone(config.method, _chosen(config, None), template),
            _alone(f"{config.method} + DCI", _chosen(config, config.strength), config.method)]


def lambdas(config: SweepConfig) -> list[Line]:
    """From hardly any injection to too much."""
    points = tuple(_chosen(config, strength) for strength in config.lambdas)
    return [_raw(config), Line("DCI over lambda", points, _numbers(config.lambdas), "raw model")]


def chosen(config: SweepConfig) -> list[Line]:
    """The strengths that the program chooses among, each on its own, compared with its choice."""
    lines = [_raw(config)]
    for strength in config.lambdas:
        lines.append(_alone(f"lambda {strength:g}", _chosen(config, strength), CHOSEN))
    return lines


def ablations(config: SweepConfig) -> list[Line]:
    """Each part of DCI taken out."""
    lines = [_alone("DCI", _chosen(config, config.strength)), _raw(config, "DCI")]
    for label, key in ABLATIONS.items():
        lines.append(_alone(label, _chosen(config, config.strength, f"dci.ablation={key}"), "DCI"))
    return lines


def masks(config: SweepConfig) -> list[Line]:
    """One point, whose masks are drawn."""
    return [_alone("DCI", _chosen(config, config.strength))]


def auxiliary_nouns(config: SweepConfig) -> list[Line]:
    """Ways to choose the auxiliary noun; the first is compared with."""
    lines: list[Line] = []
    for name, noun in config.nouns.items():
        settings = () if noun is None else (f"dci.replace_noun={noun}",)
        lines.append(_alone(name, _chosen(config, config.strength, *settings), _first(lines)))
    return [*lines, _raw(config, _first(lines))]


def _first(lines: Sequence[Line]) -> str | None:
    """What later lines are compared with; nothing where there is none yet."""
    return lines[0].label if lines else None


def phase(config: SweepConfig) -> list[Line]:
    """The share T_a of the steps that have two branches."""
    return [_raw(config), _over(config, "DCI over T_a", config.strength, "dci.agg_time", config.agg_times)]


def guidance(config: SweepConfig) -> list[Line]:
    """How the branches share guidance and noise."""
    lines: list[Line] = []
    for shared, noise in product(("separate", "shared"), ("independent", "common")):
        job = _chosen(config, config.strength, f"dci.guidance={shared}", f"dci.noise={noise}")
        lines.append(_alone(f"{shared} guidance, {noise} noise", job, _first(lines)))
    return lines


def replaced(config: SweepConfig) -> list[Line]:
    """The fine-tuned weights with other words in the concept's place, beside the base model."""
    tuned = "tuned, concept words"
    base_noun, base_auxiliary = Job("", BASE, 0, words=NOUN), Job("", BASE, 0, words=AUXILIARY)
    return [_alone(tuned, _chosen(config, None)),
            _alone("tuned, class noun", _chosen(config, None, words=NOUN), tuned),
            _alone("tuned, auxiliary noun", _chosen(config, None, words=AUXILIARY), tuned),
            _alone("base model, class noun", base_noun, tuned),
            _alone("base model, auxiliary noun", base_auxiliary, tuned)]


def gains(config: SweepConfig) -> list[Line]:
    """DBIM's constant 500, which the release set for SD v1; lambda acts through it, hence a line for each strength."""
    lines = [_raw(config)]
    for strength in config.strengths or [config.strength]:
        label = f"DCI over mask_sum, lambda {strength:g}"
        lines.append(_over(config, label, strength, "dci.mask_sum", config.gains))
    return lines


_ALL = (
    Claim("tradeoff", "Fig. 6, 8", "Is ICO's trade-off curve above the manual templates' with as many concept words?",
          tradeoff),
    Claim("dci", "Fig. 6", "Does DCI beat the raw model of the same concept file at equal U-Net work?", dci),
    Claim("methods", "sections 3.2, 3.3", "What does ICO add to a manual template, and DCI to ICO?", methods),
    Claim("lambda", "Fig. 9", "Does more injection buy prompt agreement for little fidelity, until it is too much?",
          lambdas),
    Claim("chosen", "ours", "Does a lambda that a CLIP chooses for each image do as well as the best fixed one?",
          chosen, chosen=True),
    Claim("ablations", "Fig. 10", "Does DCI need masks, entire prompts, aggregation in every layer, shared weights?",
          ablations),
    Claim("masks", "Fig. 11", "What do the masks look like at each resolution?", masks, masks=True),
    Claim("nouns", "Fig. 12", "Does an auxiliary noun that is likely in the context help, and a bad one harm?",
          auxiliary_nouns),
    Claim("phase", "section 3.3", "How long should the stage with two branches be?", phase),
    Claim("guidance", "release", "Which is better: guidance of their own or shared, noise independent or common?",
          guidance),
    Claim("replaced", "section 3.3", "Does editability come back when the concept words are replaced?", replaced),
    Claim("gains", "eq 3, 4", "Do the release's constants suit a model of fewer pixels?", gains))
CLAIMS = {claim.name: claim for claim in _ALL}
SWEEP = Claim("sweep", "Fig. 6", "How do the configured methods trade fidelity for editability?", sweep)


def find_claims(names: list[str]) -> list[Claim]:
    """Returns claims by name; `all` is every one.

    Raises:
        UserError: a name is unknown, or none is given.
    """
    known = ", ".join([*CLAIMS, "all"])
    if not names:
        raise UserError(f"no claim is named; claims: {known}.")
    for name in names:
        if name not in CLAIMS and name != "all":
            raise UserError(f"claim '{name}' is unknown; claims: {known}.")
    if "all" in names:
        return list(CLAIMS.values())
    return [CLAIMS[name] for name in dict.fromkeys(names)]
