"""Writes a release: weights, config, model card, figures, licence, programs."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from etils import epath

from atebm_jax import checkpoint, release_format, storage, trained
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.evaluate import html, report
from atebm_jax.local_path import is_name
from atebm_jax.release import card, programs
from atebm_jax.release.licences import Licence

# Where the figures and their plots lie, in a workdir and in a release.
EVALUATION = "evaluation"


class Evaluation(NamedTuple):
    """folder: of an evaluation; report: what its report.json says."""

    folder: epath.Path
    report: dict[str, Any]


def evaluation_of(workdir: str, given: str | None) -> Evaluation | None:
    """The evaluation that a release shows, as the flag --evaluation has it.

    Args:
      workdir: of the model, whose own evaluation is taken if the flag is not given.
      given: a folder, "none", or None.

    Raises:
      UserError: it cannot be read.
    """
    if given == "none" or (given is None and is_name(workdir)):
        return None
    folder = storage.reached(given or os.path.join(workdir, EVALUATION))
    if given is None and not (folder / "report.json").exists():
        return None
    return Evaluation(folder, report.read_figures(folder))


def write(
    loaded: trained.Trained,
    out: str,
    *,
    evaluation: Evaluation | None,
    license_: Licence,
    name: str | None = None,
    programs_too: bool = False,
) -> list[str]:
    """Writes the folder, whole or not at all.

    Args:
      loaded: the model.
      out: the folder, which is not there yet, or empty.
      evaluation: of this model, for the card; None for a card without figures.
      license_: of the weights.
      name: title of the card; default the folder's name.
      programs_too: add what runs with JAX alone (`programs`).

    Returns:
      Sentences that say what was written.

    Raises:
      UserError: the evaluation is of other weights, or the folder cannot be written.
    """
    if evaluation is not None:
        _check_same(evaluation, loaded)
    name = name or os.path.basename(os.path.abspath(out))
    made_of = evaluation.report if evaluation else None
    with storage.appears_whole(out, "--out") as made:
        folder = epath.Path(made)
        folder.mkdir()
        release_format.write(folder, loaded.variables, _meta(loaded))
        if evaluation is not None:
            _copy(evaluation, folder / EVALUATION)
        if programs_too:
            programs.write(loaded, folder / programs.FOLDER)
        text = card.text(loaded, made_of, name, license_.name, programs_too)
        storage.replace_text(folder / "README.md", text)
        storage.replace_text(folder / "LICENSE", license_.text)
    said = [f"the release is in {out}: atebm_jax.load({out!r})"]
    if evaluation is None:
        said.append(
            "the card has no figures: python -m atebm_jax.evaluate measures them"
        )
    if paths := _local_paths(loaded.config):
        said.append(f"config.json names places of this machine: {'; '.join(paths)}")
    return said


def _meta(loaded: trained.Trained) -> dict[str, Any]:
    """What `config.json` says, and the Gaussians that seeds are drawn from."""
    config = checkpoint.as_json(loaded.config)
    names = loaded.class_names
    meta = loaded.meta | {"config": config, "class_names": names and list(names)}
    kept = loaded.gaussian
    return meta | {"seeds": {} if kept is None else kept.arrays()}


def _check_same(evaluation: Evaluation, loaded: trained.Trained) -> None:
    """Refuses figures of other weights."""
    measured: Mapping[str, Any] = evaluation.report.get("checkpoint", {})
    if measured.get("averaged_weights_sha256") != loaded.fingerprint:
        stage, step = loaded.meta["stage"], loaded.meta["step"]
        raise UserError(
            f"the evaluation in {evaluation.folder} is of {measured.get('stage')} step "
            f"{measured.get('step')} and this model is {stage} step {step}, with other "
            "weights: evaluate this one, or give another --evaluation (none for a card "
            "without figures)."
        )


def _copy(evaluation: Evaluation, to: epath.Path) -> None:
    """The report and its plots."""
    to.mkdir()
    plots = [
        p for x in evaluation.report["metrics"].values() for p in x.get("plots", ())
    ]
    # Evaluations of earlier versions have no page.
    page = [html.FILE] if (evaluation.folder / html.FILE).exists() else []
    try:
        for name in ("report.json", *page, *plots):
            content = (evaluation.folder / name).read_bytes()
            storage.replace_bytes(to / os.path.basename(name), content)
    except OSError as error:
        raise UserError(
            f"the evaluation in {evaluation.folder} is not complete ({error}): give "
            "the same evaluate command again."
        ) from error


def _local_paths(config: Any) -> list[str]:
    """Fields of a config that hold a path, for a look before the release is public."""
    fields = configuration.flatten(config)
    return [f"{k} {v}" for k, v in fields if isinstance(v, str) and os.sep in v]
