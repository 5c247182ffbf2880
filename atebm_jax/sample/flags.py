"""The flags of the sample commands; imports nothing slow, so that --help is quick."""

from atebm_jax.command_line import Parser
from atebm_jax.evaluate.options import Options


def of_sampling() -> Parser:
    """Flags of the command without a name: sampling."""
    parser = _parser(
        "",
        "Draws images from a trained model by descent of its energy. Image i is the "
        "same whatever --count and the number of devices. Other commands: explain "
        "IMAGE, edit IMAGE (each with --help).",
        out="PNG files, grid.png and samples.npz",
    )
    add = parser.add_argument
    add("--count", type=int, default=64, help="images, default 64")
    add("--classes", help="3,7 or names: these classes in turn; default all")
    add("--unconditional", action="store_true", help="no class, by E(x)")
    add(
        "--seeds",
        help="noise, gaussian or gaussian_per_class (of a checkpoint trained so), own "
        "(config.data.seeds) or a source; default as in training where these were "
        "drawn, noise where they were read",
    )
    add("--target_energy", type=float, help="an image stops at this energy")
    add("--smooth", type=float, default=0.0, help="Gaussian blur of the seeds, pixels")
    add(
        "--quantise",
        default=Options.quantise,
        help="to bytes: reference (down, default: as evaluate does) or nearest",
    )
    return parser


def of_explain() -> Parser:
    """Flags of `explain`."""
    parser = _parser(
        " explain",
        "Counterfactuals: what an image would look like as another class, in a ball "
        "around it.",
        out="strips, results and explain.json",
    )
    _add_images(parser)
    add = parser.add_argument
    add("--target", required=True, help="3,7 or names of classes, or all")
    add("--radius", default="4", help="1,2,4: pixels of the norm; default 4")
    return parser


def of_edit() -> Parser:
    """Flags of `edit`."""
    parser = _parser(
        " edit",
        "Edits images by descent of the energy under a constraint: inpainting, class "
        "translation, denoising, super-resolution.",
        out="strips, results and edit.json",
    )
    _add_images(parser)
    add = parser.add_argument
    add("--task", required=True, help="inpaint, translate, denoise or superres")
    add(
        "--target",
        help="a class by number or name; guess: what the model takes the "
        "image for; any (default, but not of translate): no class, by E(x)",
    )
    add("--mask", help="image file, white where pixels may change")
    add("--fill", help="inpaint: of the hole at first: mean (default), noise or image")
    add("--radius", type=float, help="stay in this ball too; default of translate 4")
    add(
        "--sigma",
        type=float,
        help="denoise: noise's standard deviation, pixels of a [0, 1] image",
    )
    add(
        "--strength",
        type=float,
        help="denoise: radius as a share of the noise's length, default 0.5",
    )
    add("--factor", type=int, help="superres: result is so many times as wide")
    add(
        "--degrade",
        action="store_true",
        help="images are the truth: add the noise or make them small first, and "
        "compare",
    )
    add(
        "--reference",
        action="append",
        default=[],
        metavar="IMAGE",
        help="the truth of an image, for its PSNR; repeat it for several images",
    )
    return parser


def _parser(command: str, description: str, out: str) -> Parser:
    """With the flags of all commands: model, folders, sampler."""
    program = f"python -m atebm_jax.sample{command}"
    parser = Parser(prog=program, description=description, allow_abbrev=False)
    add = parser.add_argument
    add(
        "--workdir",
        required=True,
        help="workdir, checkpoint, release, hf:OWNER/NAME or zoo:NAME",
    )
    add("--best_by", help="robust_accuracy or sample_distance: that checkpoint")
    add(
        "--classes_by_place",
        action="store_true",
        help="class k of data sets is class k of the network, whatever their names",
    )
    add("--out", required=True, help=f"folder for {out}")
    add("--data_dir", default="", help="where TFDS data sets lie")
    add(
        "--sampler",
        help="a rule of atebm_jax.ascent, with settings: 'sgld(noise=0.005)'; "
        "default: the config's" + (command and "; in balls pgd, in linf balls sign"),
    )
    add("--schedule", default="constant", help="constant, linear or cosine")
    add(
        "--step_size",
        type=float,
        help="default: the config's"
        + (command and "; in balls radius / 5 if that is less"),
    )
    add("--num_steps", type=int, help="default: the config's")
    add("--seed", type=int, default=0, help="of noise")
    return parser


def _add_images(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="files, folders, or data sets such as digits:test",
    )
    add("--index", help="0,5,10:20 or all: which images of folders and data sets")
    add("--resize", action="store_true", help="scale and cut files of other sizes")
    add("--norm", default="l2", help="of the ball: l2 or linf")
