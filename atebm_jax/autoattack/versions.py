"""Which attacks run in which version of the ensemble, and how long."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atebm_jax import attacks
from atebm_jax.autoattack import balls, fab, objectives, square
from atebm_jax.errors import UserError, check_choice

Threat = attacks.Threat | tuple[str, float]


class Settings(NamedTuple):
    """How long each attack runs; the numbers of Croce and Hein (2020) by default."""

    num_steps: int = 100  #: of each search of APGD and FAB
    num_queries: int = 5000  #: of Square
    apgd_restarts: int = 1  #: searches of APGD-CE and APGD-DLR
    fab_restarts: int = 1  #: searches of FAB, the first from the image itself
    targets: int = 9  #: of APGD-T: the classes ranked 2nd to (targets + 1)-th
    fab_targets: int = 9  #: of FAB-T: the classes ranked 2nd to (fab_targets + 1)-th
    gradient_samples: int = 1  #: of APGD: passes of which a gradient is the mean
    wide_ball: bool = False  #: of APGD in L1: balls of three and two radii first

    def heeded_by(self, name: str) -> "Settings":
        """What a search of an attack heeds; the defaults elsewhere."""
        family = ATTACKS[name].family
        return Settings(
            **{k: v for k, v in self._asdict().items() if k in _HEEDS[family]}
        )


class Version(NamedTuple):
    """Names of attacks in their order, and their settings."""

    attacks: tuple[str, ...]
    settings: Settings


class Attack(NamedTuple):
    """One attack of the ensemble."""

    family: str  #: "apgd", "fab" or "square"
    norms: tuple[str, ...]  #: what it is defined for here
    rounds: str = ""  #: the setting that says how many, where there may be several
    targeted: bool = False  #: its rounds are target classes, not restarts
    objective: str = ""  #: APGD's, a key of `objectives.UNTARGETED` or `TARGETED`


_ALL = tuple(balls.LENGTHS)
ATTACKS: dict[str, Attack] = {
    "apgd-ce": Attack("apgd", _ALL, "apgd_restarts", objective="ce"),
    "apgd-dlr": Attack("apgd", _ALL, "apgd_restarts", objective="dlr"),
    "apgd-t": Attack("apgd", _ALL, "targets", targeted=True, objective="dlr"),
    "fab": Attack("fab", fab.NORMS, "fab_restarts"),
    "fab-t": Attack("fab", fab.NORMS, "fab_targets", targeted=True),
    "square": Attack("square", square.NORMS),
}

# The settings that a search of a family heeds.
_HEEDS = {
    "apgd": {"num_steps", "gradient_samples", "wide_ball"},
    "fab": {"num_steps"},
    "square": {"num_queries"},
}

_STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
_PLUS = ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t")

VERSIONS: dict[str, Version] = {
    "standard": Version(_STANDARD, Settings()),
    "plus": Version(_PLUS, Settings(apgd_restarts=5, fab_restarts=5)),
    "rand": Version(("apgd-ce", "apgd-dlr"), Settings(gradient_samples=20)),
    "custom": Version((), Settings()),
}

# The standard version for L1 (Croce and Hein, 2021).
_STANDARD_L1 = Settings(apgd_restarts=5, targets=5, wide_ball=True)


class Round(NamedTuple):
    """One pass of an attack over the images that are still robust."""

    attack: str  #: a key of `ATTACKS`
    #: The restart, from 0; for targeted attacks the rank of the target class, from 1
    #: (the second most likely one).
    number: int


class Plan(NamedTuple):
    """What will run."""

    norm: str  #: a key of `balls.LENGTHS`
    epsilon: float  #: radius
    rounds: tuple[Round, ...]  #: in their order
    settings: Settings
    notes: tuple[str, ...]  #: what is done otherwise than asked, one sentence each
    #: "AutoAttack" and the version where all of its attacks run; the attacks' names
    #: where only some do, or where they were chosen.
    title: str

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks that run, in their order."""
        return tuple(dict.fromkeys(round_.attack for round_ in self.rounds))

    def settings_in_use(self) -> dict[str, Any]:
        """The settings that an attack which runs heeds."""
        used = {ATTACKS[name].rounds for name in self.attacks}
        used = used.union(*(_HEEDS[ATTACKS[n].family] for n in self.attacks))
        if self.norm != "l1":
            used.discard("wide_ball")
        settings = self.settings._asdict()
        return {name: value for name, value in settings.items() if name in used}


def plan(
    version: str,
    threat: Threat,
    num_classes: int,
    *,
    names: Sequence[str] | None = None,
    settings: dict[str, Any] | None = None,
) -> Plan:
    """Lays out the rounds of a version for a threat and a number of classes.

    Args:
      version: a key of `VERSIONS`.
      threat: of `attacks.threat`, or ("linf", "l2" or "l1", radius >= 0).
      num_classes: K.
      names: the attacks of "custom", in their order.
      settings: fields of `Settings` to replace.

    Raises:
      UserError: an unknown name, a radius that is no ball, attacks given to a version
        that has its own.
    """
    norm, epsilon = _check_threat(threat)
    chosen = _choose(version, names)
    default = VERSIONS[version].settings
    if norm == "l1" and version in ("standard", "custom"):
        default = _STANDARD_L1
    wanted = _replace(default, settings or {})
    notes: list[str] = []
    rounds: list[Round] = []
    for name in chosen:
        attack = ATTACKS[name]
        if norm not in attack.norms:
            notes.append(
                f"{name} is not run: it is not defined here for {norm}, only for "
                f"{', '.join(attack.norms)}."
            )
            continue
        rounds += [Round(name, n) for n in _numbers(attack, num_classes, wanted)]
    notes += _class_notes(chosen, num_classes, wanted)
    if epsilon == 0 or num_classes == 1:
        reason = "the radius is 0" if epsilon == 0 else "there is a single class"
        notes.append(f"No attack is run: {reason}, so that none can succeed.")
        rounds = []
    ran = dict.fromkeys(round_.attack for round_ in rounds)
    whole = version != "custom" and tuple(ran) == chosen
    title = f"AutoAttack {version}" if whole else ", ".join(ran) or "no attack"
    return Plan(norm, epsilon, tuple(rounds), wanted, tuple(notes), title)


def _check_threat(threat: Threat) -> tuple[str, float]:
    norm, epsilon = threat[0], float(threat[1])
    check_choice("threat norm", norm, balls.LENGTHS, of=" for AutoAttack")
    if not 0 <= epsilon < float("inf"):
        raise UserError(
            f"{norm} radius epsilon is {epsilon!r}: AutoAttack needs a finite ball, "
            "8/255 for linf or 0.5 for l2, say."
        )
    return norm, epsilon


def _choose(version: str, names: Sequence[str] | None) -> tuple[str, ...]:
    check_choice("version", version, VERSIONS, of=" of AutoAttack")
    if version != "custom":
        if names is not None:
            raise UserError(
                f"version {version!r} has its own attacks: to choose attacks use "
                "version 'custom'."
            )
        return VERSIONS[version].attacks
    if not names or isinstance(names, str) or len(set(names)) < len(names):
        raise UserError(
            f"version 'custom' needs a list of different attacks, got {names!r}: "
            f"choose among {', '.join(ATTACKS)}."
        )
    for name in names:
        check_choice("attack", name, ATTACKS)
    return tuple(names)


def _replace(default: Settings, changes: dict[str, Any]) -> Settings:
    for name, value in changes.items():
        check_choice("setting", name, Settings._fields, of=" of AutoAttack")
        counts = isinstance(value, int | np.integer) and value >= 1
        if name != "wide_ball" and not counts:
            raise UserError(
                f"AutoAttack's setting {name} is {value!r}: it must be a whole number "
                "of at least 1."
            )
    return default._replace(**changes)


def _numbers(attack: Attack, num_classes: int, settings: Settings) -> range:
    """The numbers of an attack's rounds."""
    wanted = settings._asdict().get(attack.rounds, 1)
    return range(1, min(wanted + 1, num_classes)) if attack.targeted else range(wanted)


def _class_notes(
    names: Sequence[str], num_classes: int, settings: Settings
) -> list[str]:
    notes = []
    for name in names:
        wanted = settings._asdict().get(ATTACKS[name].rounds, 1)
        if ATTACKS[name].targeted and 1 < num_classes <= wanted:
            notes.append(
                f"{name} has {num_classes - 1} instead of {wanted} target "
                f"classes: there are only {num_classes} classes."
            )
    for name in names:
        objective, targeted = ATTACKS[name].objective, ATTACKS[name].targeted
        if objectives.defined(objective, num_classes, targeted) != objective:
            notes.append(
                f"{name} ascends the plain margin: its DLR loss is undefined for "
                f"{num_classes} class{'es' if num_classes > 1 else ''}."
            )
    return notes
