"""Which attacks run in which version of the ensemble, and how long."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from atebm_jax import attacks
from atebm_jax.autoattack import balls, fab, objectives, square
from atebm_jax.errors import UserError

Threat = attacks.Threat | tuple[str, float]


class Settings(NamedTuple):
    """How long each attack runs; the numbers of Croce and Hein (2020) by default.

    Attributes:
      num_steps: of a search of APGD and FAB.
      num_queries: of Square.
      apgd_restarts: of APGD-CE and APGD-DLR.
      fab_restarts: of FAB; the first starts at the image itself.
      targets: of APGD-T: the classes ranked 2nd to (targets + 1)-th.
      fab_targets: the same of FAB-T.
      gradient_samples: passes a gradient is averaged over (randomised networks).
      wide_ball: L1: search in balls of three and two radii first.
    """

    num_steps: int = 100
    num_queries: int = 5000
    apgd_restarts: int = 1
    fab_restarts: int = 1
    targets: int = 9
    fab_targets: int = 9
    gradient_samples: int = 1
    wide_ball: bool = False


class Version(NamedTuple):
    """Names of attacks in their order, and their settings."""

    attacks: tuple[str, ...]
    settings: Settings


class Attack(NamedTuple):
    """One attack of the ensemble.

    Attributes:
      family: "apgd", "fab" or "square".
      objective: APGD's, a key of `objectives.UNTARGETED` or `TARGETED`.
      targeted: one round a target class instead of one a restart.
      norms: what it is defined for here.
    """

    family: str
    objective: str
    targeted: bool
    norms: tuple[str, ...]


ATTACKS: dict[str, Attack] = {
    "apgd-ce": Attack("apgd", "ce", False, tuple(balls.LENGTHS)),
    "apgd-dlr": Attack("apgd", "dlr", False, tuple(balls.LENGTHS)),
    "apgd-t": Attack("apgd", "dlr", True, tuple(balls.LENGTHS)),
    "fab": Attack("fab", "", False, fab.NORMS),
    "fab-t": Attack("fab", "", True, fab.NORMS),
    "square": Attack("square", "", False, square.NORMS),
}

# Which attacks a setting is for.
_APGD = tuple(name for name, attack in ATTACKS.items() if attack.family == "apgd")
_HEEDED_BY: dict[str, tuple[str, ...]] = {
    "num_steps": (*_APGD, "fab", "fab-t"),
    "num_queries": ("square",),
    "apgd_restarts": ("apgd-ce", "apgd-dlr"),
    "fab_restarts": ("fab",),
    "targets": ("apgd-t",),
    "fab_targets": ("fab-t",),
    "gradient_samples": _APGD,
    "wide_ball": _APGD,
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
    """One pass of an attack over the images that are still robust.

    Attributes:
      attack: a key of `ATTACKS`.
      number: restart, from 0; for targeted attacks the rank of the target class,
        from 1 (the second most likely one).
    """

    attack: str
    number: int


class Plan(NamedTuple):
    """What will run.

    Attributes:
      norm, epsilon: the threat.
      rounds: in their order.
      objectives: of the APGD attacks, as they are defined for so many classes.
      settings: how long.
      notes: what is done otherwise than asked, one sentence each.
      title: what runs: "AutoAttack" and the version where all of its attacks do, their
        names where some of them do, or where they were chosen.
    """

    norm: str
    epsilon: float
    rounds: tuple[Round, ...]
    objectives: dict[str, str]
    settings: Settings
    notes: tuple[str, ...]
    title: str

    @property
    def attacks(self) -> tuple[str, ...]:
        """Names of the attacks that run, in their order."""
        return tuple(dict.fromkeys(round_.attack for round_ in self.rounds))

    def settings_in_use(self) -> dict[str, Any]:
        """The settings that an attack which runs heeds."""
        return {
            name: value
            for name, value in self.settings._asdict().items()
            if set(_HEEDED_BY[name]) & set(self.attacks)
            and (name != "wide_ball" or self.norm == "l1")
        }


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
    used: dict[str, str] = {}
    for name in chosen:
        attack = ATTACKS[name]
        if norm not in attack.norms:
            notes.append(
                f"{name} is not run: it is not defined here for {norm}, only for "
                f"{', '.join(attack.norms)}."
            )
            continue
        rounds += _rounds(name, attack, num_classes, wanted)
        if attack.family == "apgd":
            used[name] = objectives.defined(
                attack.objective, num_classes, attack.targeted
            )
    notes += _class_notes(chosen, num_classes, wanted, used)
    if epsilon == 0 or num_classes == 1:
        reason = "the radius is 0" if epsilon == 0 else "there is a single class"
        notes.append(f"No attack is run: {reason}, so that none can succeed.")
        rounds = []
    ran = dict.fromkeys(round_.attack for round_ in rounds)
    whole = version != "custom" and tuple(ran) == chosen
    title = f"AutoAttack {version}" if whole else ", ".join(ran) or "no attack"
    return Plan(norm, epsilon, tuple(rounds), used, wanted, tuple(notes), title)


def _check_threat(threat: Threat) -> tuple[str, float]:
    norm, epsilon = threat[0], float(threat[1])
    if norm not in balls.LENGTHS:
        raise UserError(
            f"unknown threat norm {norm!r} for AutoAttack: choose one of "
            f"{', '.join(balls.LENGTHS)}."
        )
    if not 0 <= epsilon < float("inf"):
        raise UserError(
            f"{norm} radius epsilon is {epsilon!r}: AutoAttack needs a finite ball, "
            "8/255 for linf or 0.5 for l2, say."
        )
    return norm, epsilon


def _choose(version: str, names: Sequence[str] | None) -> tuple[str, ...]:
    if version not in VERSIONS:
        raise UserError(
            f"unknown version {version!r} of AutoAttack: choose one of "
            f"{', '.join(VERSIONS)}."
        )
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
    unknown = [name for name in names if name not in ATTACKS]
    if unknown:
        raise UserError(
            f"unknown attack {unknown[0]!r}: choose among {', '.join(ATTACKS)}."
        )
    return tuple(names)


def _replace(default: Settings, changes: dict[str, Any]) -> Settings:
    for name, value in changes.items():
        if name not in Settings._fields:
            raise UserError(
                f"unknown setting {name!r} of AutoAttack: choose among "
                f"{', '.join(Settings._fields)}."
            )
        if name != "wide_ball" and (int(value) != value or value < 1):
            raise UserError(
                f"AutoAttack's setting {name} is {value!r}: it must be a whole number "
                "of at least 1."
            )
    return default._replace(**changes)


def _rounds(
    name: str, attack: Attack, num_classes: int, settings: Settings
) -> list[Round]:
    if attack.targeted:
        wanted = settings.targets if attack.family == "apgd" else settings.fab_targets
        return [Round(name, n) for n in range(1, min(wanted, num_classes - 1) + 1)]
    restarts = {"apgd": settings.apgd_restarts, "fab": settings.fab_restarts}
    return [Round(name, n) for n in range(restarts.get(attack.family, 1))]


def _class_notes(
    names: Sequence[str], num_classes: int, settings: Settings, used: dict[str, str]
) -> list[str]:
    notes = []
    wanted = {"apgd-t": settings.targets, "fab-t": settings.fab_targets}
    for name in names:
        if 1 < num_classes <= wanted.get(name, 0):
            notes.append(
                f"{name} has {num_classes - 1} instead of {wanted[name]} target "
                f"classes: there are only {num_classes} classes."
            )
    for name, objective in used.items():
        if objective != ATTACKS[name].objective:
            notes.append(
                f"{name} ascends the plain margin: its DLR loss is undefined for "
                f"{num_classes} class{'es' if num_classes > 1 else ''}."
            )
    return notes
