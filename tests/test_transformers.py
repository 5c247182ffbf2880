"""XCiT and Swin: the function of their definitions and of timm's, and every naming."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch_networks

from atebm_jax import UserError, archs, ascent, convert, fitting, models
from atebm_jax.convert import exporting, importing
from atebm_jax.models import layers, swin, xcit

CLASSES, LABEL = 5, 3

# Fields of small networks, and the images' size (height, width).
XCITS = {
    "patches of 16": ({"patch": 16, "depth": 2}, (48, 32)),
    "patches of 8": ({"patch": 8, "depth": 1}, (16, 24)),
    "patches of 4": ({"patch": 4, "depth": 1}, (16, 16)),
}
SWINS = {
    # Shifted in one direction only in the last stage.
    "windows of 2": ({"window": 2, "position_grid": 16}, (128, 64)),
    "odd windows": ({"window": 3, "position_grid": 24}, (96, 96)),
    "smaller windows at the end": ({"window": 4, "position_grid": 16}, (64, 64)),
}
# With sparse activations (MeanSparse).
SPARSE = {"sparse windows": ({"window": 2, "position_grid": 8}, (32, 32))}
CASES = XCITS | SWINS | SPARSE

# Blocks of each stage, channels and heads: enough for both kinds of block.
SMALL_SWIN = ((1, 2, 1, 2), 8, 2)
SMALL_XCIT = (16, 2)


def shrink(patch):
    """The smallest size of both families is smaller still."""
    patch.setitem(xcit.SIZES, "tiny", SMALL_XCIT)
    patch.setitem(swin.SIZES, "tiny", SMALL_SWIN)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    shrink(monkeypatch)


def block_of(case, **overrides):
    fields, _ = CASES[case]
    name = "xcit_s12" if case in XCITS else "swin_s"
    name = "mean_sparse_swin_l" if case in SPARSE else name
    values = {"size": "tiny", "num_classes": CLASSES, "mean": (), "std": ()}
    return archs.model_config(name, **values | fields | overrides)


def with_weights(case, seed=0):
    """(family, network, weights, images [2, H, W, 3])."""
    block = block_of(case)
    network = models.build(block)
    shape = (*CASES[case][1], 3)
    weights = reference.random_variables(network, shape, seed)
    # Scales of the branches begin at one in public networks.
    begin = {"gamma1": 1, "gamma2": 1, "gamma3": 1, "threshold": 0.5}
    weights = jax.tree_util.tree_map_with_path(
        lambda path, x: x + begin.get(path[-1].key, 0), weights
    )
    images = np.random.default_rng(seed).random((2, *shape), np.float32)
    return block.name, network, weights, images


def exact_attention(query, key, value, bias=None, *, scale=None):
    """JAX's own in any precision: its softmax is float32."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    weights = scale * jnp.einsum("btnh,bsnh->bnts", query, key)
    weights = weights if bias is None else weights + bias
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(weights, axis=-1), value)


def ours(network, weights, images):
    """Logits, and the image gradient of one."""

    def score(x, weights):
        logits = network.apply(weights, x)
        return logits[:, LABEL].sum(), logits

    gradient, logits = jax.jit(jax.grad(score, has_aux=True))(images, weights)
    return logits, gradient


def ours_in_double(patch, network, weights, images):
    """What is float32 by design replaced: normalisation and attention."""
    patch.setattr(jax.nn, "dot_product_attention", exact_attention)
    # Flax's normalisation leaves float64 and float32 to promotion.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        weights = jax.tree.map(lambda x: np.asarray(x, np.float64), weights)
        twin = network.clone(dtype=jnp.float64)
        return ours(twin, weights, images.astype(np.float64))


def theirs(function, images):
    """The same of a function in PyTorch, in double precision."""
    torch = pytest.importorskip("torch")
    pixels = torch.tensor(images.transpose(0, 3, 1, 2)).double().requires_grad_()
    logits = function(pixels)
    logits[:, LABEL].sum().backward()
    return logits.detach().numpy(), pixels.grad.numpy().transpose(0, 2, 3, 1)


def tensors(family, weights, dtype):
    torch = pytest.importorskip("torch")
    arrays = convert.to_torch(family, weights)
    return {name: torch.tensor(x).to(dtype) for name, x in arrays.items()}


def definition(case, arrays):
    """The network of a case as a function of PyTorch's images."""
    written = pytest.importorskip("torch_transformers")
    fields, _ = CASES[case]
    if case in XCITS:
        strides = xcit.STRIDES[fields["patch"]]
        return lambda x: written.xcit(arrays, x, SMALL_XCIT[1], strides)
    last = fields["position_grid"] // 8
    sides = (*(fields["window"],) * 3, min(fields["window"], last))
    return lambda x: written.swin(arrays, x, SMALL_SWIN[2], sides)


def timms(case, arrays):
    """timm's network, with all of our weights and no others."""
    _, timm = torch_networks.torch_and_timm()
    fields, size = CASES[case]
    if case in XCITS:
        network = timm.models.xcit.Xcit(
            img_size=size,
            patch_size=8 if fields["patch"] == 8 else 16,
            num_classes=CLASSES,
            embed_dim=SMALL_XCIT[0],
            depth=fields["depth"],
            num_heads=SMALL_XCIT[1],
            tokens_norm=True,
        )
        if fields["patch"] == 4:
            for index in (0, 2):
                network.patch_embed.proj[index][0].stride = (1, 1)
    else:
        blocks, channels, heads = SMALL_SWIN
        network = timm.models.swin_transformer.SwinTransformer(
            img_size=size,
            window_size=fields["window"],
            num_classes=CLASSES,
            embed_dim=channels,
            depths=blocks,
            num_heads=[heads * 2**stage for stage in range(4)],
        )
    network.load_state_dict(arrays, strict=True)
    return network.eval()


@pytest.fixture(scope="module", params=XCITS | SWINS)
def computed(request):
    """(case, family, weights, images, logits and gradients in both precisions)."""
    pytest.importorskip("torch")  # all that is done here would be compared with nothing
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        family, network, weights, images = with_weights(request.param)
        made = ours(network, weights, images)
        doubled = ours_in_double(patch, network, weights, images)
    return request.param, family, weights, images, made, doubled


def test_logits_and_gradients_are_those_of_the_definition(computed):
    torch = pytest.importorskip("torch")
    case, family, weights, images, made, doubled = computed
    arrays = tensors(family, weights, torch.float64)
    expected = theirs(definition(case, arrays), images)
    assert expected[0].std() > 0.1 and np.abs(expected[1]).max() > 1e-3
    for single, double, value in zip(made, doubled, expected, strict=True):
        assert double.dtype == np.float64
        reference.assert_relative(single, value, 1e-5)
        reference.assert_relative(double, value, 1e-11)


def test_sparse_activations_are_those_of_the_definition(monkeypatch):
    """In double precision: where a value becomes the mean, it jumps."""
    torch = pytest.importorskip("torch")
    (case,) = SPARSE
    family, network, weights, images = with_weights(case)
    doubled = ours_in_double(monkeypatch, network, weights, images)
    arrays = tensors(family, weights, torch.float64)
    for double, value in zip(
        doubled, theirs(definition(case, arrays), images), strict=True
    ):
        reference.assert_relative(double, value, 1e-11)
    dense = {n: x for n, x in arrays.items() if not n.endswith("threshold")}
    logits, _ = theirs(definition(case, dense), images)
    assert np.abs(logits - np.asarray(doubled[0])).max() > 0.01


def in_double(network, monkeypatch):
    """timm's network in double precision: its position code is float32 otherwise."""
    written = pytest.importorskip("torch_transformers")

    def forward(code, count, height, width):
        sines = written.position_code(height, width).permute(2, 0, 1)[None]
        return code.token_projection(sines).repeat(count, 1, 1, 1)

    if hasattr(network, "cls_attn_blocks"):
        monkeypatch.setattr(type(network.pos_embed), "forward", forward)
    return network.double()


def test_export_loads_strictly_into_timms_which_computes_the_same(
    computed, monkeypatch
):
    torch = pytest.importorskip("torch")
    case, family, weights, images, made, doubled = computed
    twin = timms(case, tensors(family, weights, torch.float32))
    with torch.no_grad():
        logits = twin(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    reference.assert_relative(made[0], logits, 1e-5)
    expected = theirs(in_double(twin, monkeypatch), images)
    for single, double, value in zip(made, doubled, expected, strict=True):
        reference.assert_relative(single, value, 1e-5)
        reference.assert_relative(double, value, 1e-11)


def test_position_code_is_one_turn_of_sines_and_cosines():
    code = xcit.position_code(2, 4)
    assert code.shape == (1, 2, 4, 64)
    # The first row is half way: sin(pi) and cos(pi); of columns a quarter.
    np.testing.assert_allclose(code[0, 0, 0, :2], [0, -1], atol=1e-5)
    np.testing.assert_allclose(code[0, 0, 0, 32:34], [1, 0], atol=1e-5)
    # The slowest is slower by 10,000^(30/32).
    slow = math.sin(2 * math.pi / 2 / 10_000 ** (30 / 32))
    assert code[0, 0, 3, 30] == pytest.approx(slow, rel=1e-5)


def test_offsets_and_masks_of_windows_by_hand():
    assert swin.offsets(2).tolist() == [
        [4, 3, 1, 0],
        [5, 4, 2, 1],
        [7, 6, 4, 3],
        [8, 7, 5, 4],
    ]
    hidden = swin.mask(4, 2, 2, (1, 0))
    assert hidden.shape == (2, 4, 4) and not hidden[0].any()
    # Rows 3 and, from the other end, 0: they do not see each other.
    apart = [[0, 0, -100, -100]] * 2 + [[-100, -100, 0, 0]] * 2
    assert hidden[1].tolist() == apart


def test_channels_that_are_zero_everywhere_have_a_gradient():
    x = jnp.zeros((1, 2, 1, 3))
    assert np.isfinite(jax.grad(lambda x: layers.unit(x).sum())(x)).all()


@pytest.mark.parametrize("case", ["patches of 4", "windows of 2"])
def test_forty_steps_follow_the_definition_to_rounding(case):
    """GELU is smooth: no unit jumps, and there is no difference to excuse."""
    torch = pytest.importorskip("torch")
    family, network, weights, seeds = with_weights(case, seed=2)
    step, num_steps = 0.1, 40

    @jax.jit
    def climb(weights, seeds):
        return ascent.climb(
            lambda x: network.apply(weights, x)[:, LABEL],
            seeds,
            ascent.along(ascent.unit),
            step_size=step,
            num_steps=num_steps,
            project=ascent.clip,
        )

    made = climb(weights, seeds)
    logits_of = definition(case, tensors(family, weights, torch.float32))
    x = torch.tensor(seeds.transpose(0, 3, 1, 2))
    for _ in range(num_steps):
        x = x.detach().requires_grad_()
        logits_of(x)[:, LABEL].sum().backward()
        norm = x.grad.flatten(1).norm(dim=1)[:, None, None, None]
        x = (x + step * x.grad / (norm + 1e-10)).clamp(0, 1)
    expected = x.detach().numpy().transpose(0, 2, 3, 1)
    assert np.abs(expected - seeds).max() > 0.05
    np.testing.assert_allclose(made, expected, rtol=0, atol=2e-6)


def test_training_mode_of_an_xcit_updates_all_statistics_and_evaluation_none():
    _, network, weights, images = with_weights("patches of 4")
    run = jax.jit(lambda x: network.apply(weights, x, train=True, mutable=True))
    logits, new = run(images)
    frozen = jax.jit(lambda x: network.apply(weights, x, mutable=True))
    kept, same = frozen(images)
    assert np.abs(logits - kept).max() > 1e-3
    old = weights["batch_stats"]
    reference.assert_same_bits(same["batch_stats"], old)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), new["batch_stats"], old)
    assert min(jax.tree.leaves(moved)) > 0


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("xcit_s12", (224, 232), r"\(224, 232\).*multiples of 16 .*patches of 16"),
        ("xcit_s12_p4", (34, 32), r"\(34, 32\).*multiples of 4 "),
        ("swin_b", (256, 224), r"\(256, 224\).*multiples of 224 .*windows of 7, 7, 7"),
        ("swin_l_mimir", (112, 224), r"multiples of 224 .*windows of 14, 14, 14, 7"),
    ],
)
def test_images_that_do_not_fit_are_refused(name, size, message):
    network = models.build(archs.model_config(name))
    with pytest.raises(UserError, match=message):
        models.variable_shapes(network, (*size, 3))


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("xcit_s12", "size", "base", "'base' of an XCiT.*tiny, small, medium, large"),
        ("xcit_s12", "patch", 12, "patch is 12.*16, 8, 4 pixels"),
        ("xcit_s12", "depth", 0, "depth is 0.*1 to 96"),
        ("swin_b", "size", "huge", "'huge' of a Swin.*tiny, small, base, large"),
        ("swin_b", "position_grid", 14, "position_grid is 14.*multiple of 8"),
        ("swin_b", "window", 0, "window is 0.*at least one"),
        ("swin_b", "norm_epsilon", math.inf, "norm_epsilon is inf.*in .0, 1."),
    ],
)
def test_transformer_that_cannot_be_built_is_refused(name, field, value, message):
    with pytest.raises(UserError, match=message):
        models.build(archs.model_config(name, **{field: value}))


def test_weights_for_patches_of_4_are_not_taken_for_patches_of_16():
    """Both have the same shapes."""
    expected, stored = (block_of("patches of 16", patch=patch) for patch in (16, 4))
    with pytest.raises(UserError, match="--config.model.patch=4"):
        fitting.check_function(expected, stored.to_dict(), "runs/x")


# Files: how their authors and older versions of timm name and divide the arrays.


def older_swin(arrays):
    """timm's before version 0.9, and the authors': also what they keep beside."""

    def renamed(name):
        name = name.replace("head.fc.", "head.")
        earlier = lambda match: f"layers.{int(match[1]) - 1}.downsample"
        return re.sub(r"layers\.(\d)\.downsample", earlier, name)

    made = {renamed(name): array for name, array in arrays.items()}
    for stage, count in enumerate(SMALL_SWIN[0]):
        for block in range(count):
            name = f"layers.{stage}.blocks.{block}"
            made[f"{name}.attn.relative_position_index"] = np.zeros((4, 4), np.int64)
            if block % 2:
                made[f"{name}.attn_mask"] = np.full((4, 4, 4), -100, np.float32)
    return made


def torchvisions_swin(arrays):
    made = {}
    parts = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}
    stems = {"patch_embed.proj": "features.0.0", "patch_embed.norm": "features.0.2"}
    for name, array in arrays.items():
        for before, after in (parts | stems | {"head.fc": "head"}).items():
            name = name.replace(f"{before}.", f"{after}.")
        name = re.sub(
            r"layers\.(\d)\.blocks", lambda m: f"features.{2 * int(m[1]) + 1}", name
        )
        name = re.sub(
            r"layers\.(\d)\.downsample", lambda m: f"features.{2 * int(m[1])}", name
        )
        made[name] = array
        if name.endswith("relative_position_bias_table"):
            index = name.replace("bias_table", "index")
            made[index] = np.zeros(16, np.int64)
    return made


def authors_xcit(arrays):
    made = {}
    for name, array in arrays.items():
        match = re.fullmatch(r"(cls_attn_blocks\.\d\.attn)\.([qkv])\.(\w+)", name)
        if match is None:
            made[name.replace("pos_embed.", "pos_embeder.")] = array
        elif match[2] == "q":
            parts = [arrays[f"{match[1]}.{part}.{match[3]}"] for part in "qkv"]
            made[f"{match[1]}.qkv.{match[3]}"] = np.concatenate(parts)
    return made


FILES = {
    "timm's XCiT": ("patches of 16", dict),
    "the authors' XCiT": ("patches of 8", authors_xcit),
    "timm's Swin": ("windows of 2", dict),
    "an older Swin": ("windows of 2", older_swin),
    "torchvision's Swin": ("odd windows", torchvisions_swin),
    "a sparse Swin": ("sparse windows", dict),
}


def save(arrays, path, mean=(0.25, 0.5, 0.75)):
    """As users save a network behind its normalisation."""
    torch = pytest.importorskip("torch")
    state = {f"model.{name}": torch.tensor(x) for name, x in arrays.items()}
    for kind, values in {"mean": mean, "std": (0.5,) * 3}.items():
        state[f"normalize.{kind}"] = torch.tensor(values).reshape(1, 3, 1, 1)
    torch.save(state, path)
    return path


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(importing, "probe_logits", lambda *_: np.zeros(CLASSES))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("source", FILES)
def test_network_is_recognised_from_its_file(source, tmp_path):
    case, renamed = FILES[source]
    family, _, weights, images = with_weights(case)
    file = save(renamed(convert.to_torch(family, weights)), tmp_path / "w.pt")
    made = importing.read(file, image_size=images.shape[1])
    reference.assert_same_bits(made.variables, weights)
    block = block_of(case, mean=(0.25, 0.5, 0.75), std=(0.5,) * 3)
    for field, value in block.items():
        if field in (*models.FAMILIES[family].sized_by, "name", "num_classes", "mean"):
            assert made.config.model[field] == value
    if family == "swin":
        assert made.config.model.position_grid == block.position_grid
    dropped = [step for step in made.record["unwrapped"] if "masks" in step]
    assert bool(dropped) == (source in ("an older Swin", "torchvision's Swin"))


@pytest.mark.usefixtures("uncompiled")
def test_what_no_array_shows_is_said_and_stays_through_an_export(tmp_path):
    pytest.importorskip("safetensors")
    for case, field, value in (
        ("patches of 4", "patch", 4),
        ("windows of 2", "norm_epsilon", 1e-6),
    ):
        family, _, weights, images = with_weights(case)
        file = save(convert.to_torch(family, weights), tmp_path / "w.pt")
        guessed = importing.read(file, image_size=images.shape[1])
        assert guessed.config.model[field] != value
        said = [line for line in guessed.record["assumed"] if line.startswith(field)]
        assert len(said) == 1 and "--arch" in said[0]
        guessed.config.model[field] = value
        importing.write(guessed, tmp_path / family)
        exported = tmp_path / f"{family}.safetensors"
        exporting.export(str(tmp_path / family), str(exported))
        again = importing.read(exported, image_size=images.shape[1])
        assert again.config.model[field] == value
        assert not any(line.startswith(field) for line in again.record["assumed"])


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(
    ("classes", "patch", "mean"), [(10, 4, 0.4914), (100, 4, 0.5071), (7, 16, 0.485)]
)
def test_small_images_are_told_by_the_number_of_classes(
    classes, patch, mean, tmp_path, monkeypatch
):
    torch = pytest.importorskip("torch")
    monkeypatch.setitem(xcit.SIZES, "small", SMALL_XCIT)
    monkeypatch.delitem(xcit.SIZES, "tiny")
    block = archs.model_config("xcit_s12_p4", depth=1, num_classes=classes)
    weights = reference.random_variables(models.build(block), (32, 32, 3))
    arrays = convert.to_torch("xcit", weights)
    file = tmp_path / "w.pt"
    torch.save({name: torch.tensor(x) for name, x in arrays.items()}, file)
    made = importing.read(file)
    assert made.config.model.patch == patch
    assert made.config.model.mean[0] == mean
    assert made.config.data.image_shape[0] == (32 if patch == 4 else 224)
    assert len(made.record["assumed"]) == 2


def test_published_normalisations_of_the_robust_networks():
    usual = models.FAMILIES["xcit"].torch.usual
    assert usual(archs.model_config("xcit_l12"))["mean"] == ()
    assert usual(archs.model_config("xcit_s12")) is None
    assert usual(archs.model_config("xcit_s12", depth=24))["mean"][0] == 0.485
    assert usual(archs.model_config("xcit_s12_p4", num_classes=20)) is None
    usual = models.FAMILIES["swin"].torch.usual
    assert usual(archs.model_config("swin_s"))["mean"][0] == 0.485
    # MIMIR's looks the same, and sees pixels as they are.
    assert usual(archs.model_config("swin_b")) is None
    assert usual(archs.model_config("swin_b_mimir"))["mean"] == ()
