"""Writes a release: weights, config, model card, figures, licence, programs."""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from atebm_jax import checkpoint, release_format, storage, trained
from atebm_jax import config as configuration
from atebm_jax.errors import UserError
from atebm_jax.evaluate import html, report
from atebm_jax.evaluate.html import Evaluation
from atebm_jax.local_path import beside, is_name
from atebm_jax.release import card, programs
from atebm_jax.release.licences import Licence

# Where the figures and their plots lie, in a workdir and in a release.
EVALUATION = "evaluation"


def evaluation_of(workdir: str, given: str | None) -> Evaluation | None:
    """The evaluation that a release shows, as the flag --evaluation has it.

    Args:
      workdir: of the model, whose own evaluation is taken if the flag is not given.
      given: a folder, "none", or None.

    Raises:
      UserError: it cannot be read.
    """
    if given == "none":
        return None
    folder = storage.reached(given or os.path.join(beside(workdir), EVALUATION))
    if given is None and not (folder / "report.json").exists():
        return None
    return Evaluation("", report.read_figures(folder), folder)


def write(
    loaded: trained.Trained,
    out: str,
    *,
    evaluation: Evaluation | None,
    license_: Licence,
    name: str | None = None,
    command: str | None = None,
    dtype: str = "float32",
    programs_too: bool = False,
) -> list[str]:
    """Writes the folder, whole or not at all.

    Args:
      loaded: the model.
      out: the folder, which is not there yet, or empty.
      evaluation: of this model, as it is rounded to `dtype`, for the card; None for a
        card without figures.
      license_: of the weights.
      name: title of the card; default the folder's name.
      command: what trained the weights, for the card.
      dtype: of the weights in the file, one of `release_format.DTYPES`.
      programs_too: add what runs with JAX alone (`programs`).

    Returns:
      Sentences that say what was written.

    Raises:
      UserError: the evaluation is of other weights, a weight is too large for the
        dtype, or the folder cannot be written.
    """
    name = name or os.path.basename(os.path.abspath(out))
    made_of = evaluation.report if evaluation else None
    with storage.appears_whole(out, "--out") as made:
        folder = epath.Path(made)
        folder.mkdir()
        release_format.write(folder, loaded.variables, _meta(loaded), dtype)
        # The card is about what others read; what cannot be read is not given away.
        loaded = trained.load(folder)
        if evaluation is not None:
            _check_same(evaluation, loaded, dtype)
            _copy(evaluation, folder / EVALUATION)
        if programs_too:
            programs.write(loaded, folder / programs.FOLDER)
        text = card.text(
            loaded,
            made_of,
            name=name,
            license_name=license_.name,
            command=command,
            dtype=dtype,
            programs=programs_too,
        )
        storage.replace_text(folder / "README.md", text)
        storage.replace_text(folder / "LICENSE", license_.text)
    said = [f"the release is in {out}: atebm_jax.load({out!r})"]
    if evaluation is None:
        said.append(
            "the card has no figures: python -m atebm_jax.evaluate measures them"
        )
    origin = loaded.config.init_from
    if origin not in ("", configuration.RANDOM):
        said.append(
            f"training started from {origin}: the licence of those weights may bind "
            "these too"
        )
    return said + _local_paths(loaded, made_of or {})


def _meta(loaded: trained.Trained) -> dict[str, Any]:
    """What `config.json` says, and the Gaussians that seeds are drawn from."""
    config = checkpoint.as_json(loaded.config)
    # Where data lay on the machine of the training says nothing to others.
    config["data"]["data_dir"] = ""
    names = loaded.class_names
    meta = loaded.meta | {"config": config, "class_names": names and list(names)}
    kept = loaded.gaussian
    return meta | {"seeds": {} if kept is None else kept.arrays()}


def _check_same(evaluation: Evaluation, loaded: trained.Trained, dtype: str) -> None:
    """Refuses figures of other weights."""
    measured: Mapping[str, Any] = evaluation.report.get("checkpoint", {})
    if measured.get("averaged_weights_sha256") != loaded.fingerprint:
        stage, step = loaded.meta["stage"], loaded.meta["step"]
        raise UserError(
            f"the evaluation in {evaluation.folder} is of {measured.get('stage')} step "
            f"{measured.get('step')} and this model is {stage} step {step} in {dtype}, "
            "with other weights: evaluate this one (where it is rounded, its release "
            "without figures), or give another --evaluation (none for no figures)."
        )


def _copy(evaluation: Evaluation, to: epath.Path) -> None:
    """The report and its plots."""
    to.mkdir()
    plots = report.plots_of(evaluation.report)
    # Evaluations of earlier versions have no page.
    page = [html.FILE] if (evaluation.folder / html.FILE).exists() else []
    try:
        for name in ("report.json", *page, *plots):
            content = (evaluation.folder / name).read_bytes()
            storage.replace_bytes(to / name, content)
    except OSError as error:
        raise UserError(
            f"the evaluation in {evaluation.folder} is not complete ({error}): give "
            "the same evaluate command again."
        ) from error


def _local_paths(loaded: trained.Trained, report_: Mapping[str, Any]) -> list[str]:
    """A sentence for each file with paths, for a look before the release is public."""
    figures = {
        name: value
        for name, value in configuration.flatten(report_)
        if name.rpartition(".")[2] in ("path", "source")
    }
    files: dict[str, Mapping[str, Any]] = {
        release_format.CONFIG: loaded.config,
        f"README.md and {EVALUATION}/": figures,
    }
    said = []
    for file, fields in files.items():
        paths = [
            f"{name} {value}"
            for name, value in configuration.flatten(fields)
            if isinstance(value, str) and os.sep in value and not is_name(value)
        ]
        if paths:
            said.append(f"places of this machine are in {file}: {'; '.join(paths)}")
    return said
