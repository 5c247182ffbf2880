import itertools
import logging

import numpy as np
import psutil
import pytest
from PIL import Image

from atebm_jax.data import (
    ArraySource,
    Images,
    Stream,
    eval_batches,
    materialise,
    open_source,
    parse,
    train_batches,
)
from atebm_jax.errors import UserError

STRONG = "pad_crop(1)|flip|autoaugment_cifar10|cutout(4)"


def numbered(count, size=8, channels=3):
    """A source whose image i is of grey level i, and of label i % 5."""
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None]
    images = np.broadcast_to(levels, (count, size, size, channels))
    return ArraySource(images, np.arange(count) % 5, num_classes=5, spec="numbered")


def noise(count):
    images = np.random.default_rng(1).integers(0, 256, (count, 8, 8, 3), np.uint8)
    return ArraySource(images, np.arange(count) % 5, spec="noise")


def take(count, streams, **settings):
    settings = {"batch_size": 8, "image_shape": (8, 8, 3), **settings}
    with train_batches(streams, **settings) as batches:
        return list(itertools.islice(batches, count))


def levels(batches, field="x_gen"):
    return np.concatenate([batch[field][:, 0, 0, 0] for batch in batches]).tolist()


def assert_equal(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture
def strong_streams():
    return {
        "gen": Stream(noise(50), "flip", seed=3),
        "cls": Stream(noise(50), STRONG, seed=3),
        "ood": Stream(noise(7), "random_resized_crop(8)", seed=3, labels=False),
    }


def test_batches_have_the_fields_types_and_shapes_promised(strong_streams):
    batch = take(1, strong_streams)[0]
    assert set(batch) == {"x_gen", "y_gen", "x_cls", "y_cls", "x_ood"}
    for name in ("gen", "cls", "ood"):
        assert batch[f"x_{name}"].shape == (8, 8, 8, 3)
        assert batch[f"x_{name}"].dtype == np.uint8
    assert batch["y_gen"].shape == (8,) and batch["y_gen"].dtype == np.int32


def test_labels_belong_to_their_images():
    for batch in take(5, {"gen": Stream(numbered(30))}):
        np.testing.assert_array_equal(batch["y_gen"], batch["x_gen"][:, 0, 0, 0] % 5)


def test_same_seed_gives_same_batches(strong_streams):
    first = take(4, strong_streams)
    assert_equal(first, take(4, strong_streams))
    other = {**strong_streams, "gen": Stream(noise(50), "flip", seed=4)}
    assert not np.array_equal(take(1, other)[0]["x_gen"], first[0]["x_gen"])


@pytest.mark.parametrize("start", [1, 12])
def test_start_resumes_exactly(strong_streams, start):
    whole = take(start + 3, strong_streams)
    assert_equal(take(3, strong_streams, start=start), whole[start:])


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(strong_streams, count):
    whole = take(3, strong_streams, start=2)
    parts = [
        take(3, strong_streams, start=2, process_index=p, process_count=count)
        for p in range(count)
    ]
    for step, batch in enumerate(whole):
        for key, value in batch.items():
            stacked = np.stack([part[step][key] for part in parts], axis=1)
            np.testing.assert_array_equal(stacked.reshape(value.shape), value)


@pytest.mark.parametrize("num_threads, prefetch", [(0, 0), (1, 1), (4, 2)])
def test_threads_do_not_change_the_batches(strong_streams, num_threads, prefetch):
    other = take(4, strong_streams, num_threads=num_threads, prefetch=prefetch)
    assert_equal(other, take(4, strong_streams))


def test_worker_processes_do_not_change_the_batches(strong_streams):
    other = take(5, strong_streams, num_workers=2, num_threads=1, start=1)
    assert_equal(other, take(5, strong_streams, start=1))


def test_each_epoch_holds_every_image_once_in_a_new_order():
    drawn = levels(take(6, {"gen": Stream(numbered(16))}))
    epochs = [drawn[i : i + 16] for i in range(0, 48, 16)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_augmentation_differs_between_epochs():
    source = noise(8)
    first, second = take(2, {"gen": Stream(source, "cutout(3)")})
    one = {image.tobytes() for image in first["x_gen"]}
    assert len(one & {image.tobytes() for image in second["x_gen"]}) < 4


def test_streams_of_one_source_and_seed_are_drawn_separately():
    source = numbered(64)
    batches = take(8, {"gen": Stream(source), "cls": Stream(source)})
    same = np.equal(levels(batches, "x_gen"), levels(batches, "x_cls"))
    assert same.mean() < 0.2


def test_source_smaller_than_a_batch_repeats():
    batches = take(2, {"gen": Stream(numbered(3))}, batch_size=9)
    assert np.bincount(levels(batches)).tolist() == [6, 6, 6]


def test_grey_images_keep_one_channel():
    stream = Stream(open_source("digits:train"), STRONG)
    batch = take(1, {"gen": stream}, image_shape=(8, 8, 1))[0]
    assert batch["x_gen"].shape == (8, 8, 8, 1)


def test_tfds_streams_in_workers(tfds_dir):
    source = open_source("tfds:cifar10:train[:100]", tfds_dir)
    streams = {"gen": Stream(source, "pad_crop(4)|flip")}
    shape = {"image_shape": (32, 32, 3)}
    there = take(2, streams, num_workers=1, num_threads=1, **shape)
    assert_equal(there, take(2, streams, **shape))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"batch_size": 9, "process_count": 2}, "multiple of the number of processes"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"process_index": 2, "process_count": 2}, "process_index"),
        ({"start": -1}, "start must be"),
        ({"image_shape": (8, 8, 4)}, "1 or 3 channels"),
        ({"image_shape": (8, 8)}, "height, width, channels"),
    ],
)
def test_wrong_settings_are_explained(settings, message):
    with pytest.raises(UserError, match=message):
        take(1, {"gen": Stream(numbered(9))}, **settings)


def test_labels_of_an_unlabelled_source_are_refused(flat_folder):
    source = open_source(f"folder:{flat_folder(2)}")
    with pytest.raises(UserError, match="stream 'ood' needs labels"):
        take(1, {"ood": Stream(source)})


def test_wrong_shape_names_the_image_and_the_remedy():
    streams = {"gen": Stream(numbered(9, size=12))}
    message = r"numbered\[\d\].*\[12, 12, 3\].*\[8, 8, 3\].*resize\(8\)\|center_crop"
    with pytest.raises(UserError, match=message):
        take(1, streams)
    fixed = {"gen": Stream(numbered(9, size=12), "resize(8)|center_crop(8)")}
    assert take(1, fixed)[0]["x_gen"].shape == (8, 8, 8, 3)


class Unreadable(ArraySource):
    """Fails as no file does; the exception cannot be pickled."""

    def __getitem__(self, index):
        raise RuntimeError(lambda: "a device is gone")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_other_errors_reach_the_caller(num_workers):
    source = Unreadable(np.zeros((4, 8, 8, 3), np.uint8), [0] * 4, spec="broken")
    with pytest.raises(UserError, match=r"broken\[\d\]: RuntimeError"):
        take(1, {"gen": Stream(source)}, num_workers=num_workers)


def test_killed_worker_is_told_with_what_to_do():
    streams = {"gen": Stream(numbered(9))}
    settings = {"batch_size": 3, "image_shape": (8, 8, 3), "num_workers": 1}
    with train_batches(streams, **settings) as batches:
        next(batches)
        children = psutil.Process().children(recursive=True)
        next(c for c in children if "spawn_main" in " ".join(c.cmdline())).kill()
        with pytest.raises(UserError, match=r"worker process .*exit code -9.*again"):
            for _ in range(1000):
                next(batches)


def test_closed_iterator_is_exhausted():
    batches = train_batches(
        {"gen": Stream(numbered(9))}, batch_size=3, image_shape=(8, 8, 3)
    )
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


# --- Undecodable images ---------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_images_are_replaced_by_the_next_and_named_once(
    flat_folder, caplog, num_workers
):
    root = flat_folder(12, bad=(3, 4, 11))
    source = open_source(f"folder:{root}")
    (root / "007.png").unlink()
    settings = {"batch_size": 12, "image_shape": (8, 8, 3), "num_workers": num_workers}
    streams = {"ood": Stream(source, labels=False)}
    with caplog.at_level(logging.WARNING), train_batches(streams, **settings) as it:
        drawn = [sorted(levels([next(it)], "x_ood")) for _ in range(2)]
    # 3 and 4 become 5, 7 becomes 8, and 11 becomes 0.
    expected = [5 * i for i in (0, 0, 1, 2, 5, 5, 5, 6, 8, 8, 9, 10)]
    assert drawn == [expected, expected]
    bad = {str(root / name) for name in ("003.png", "004.png", "007.png", "011.png")}
    assert set(it.bad_images["ood"]) == bad and len(it.bad_images["ood"]) == 4
    named = [r.getMessage() for r in caplog.records if "undecodable" in r.message]
    assert len(named) == 4


def test_replacement_resumes_exactly(flat_folder):
    source = open_source(f"folder:{flat_folder(10, bad=(2, 6))}")
    streams = {"ood": Stream(source, "flip|cutout(3)", labels=False)}
    assert_equal(take(2, streams, start=4), take(6, streams)[4:])


def test_truncated_jpeg_is_replaced(tmp_path, encode):
    rng = np.random.default_rng(0)
    for i in range(4):
        data = encode(rng.integers(0, 256, (40, 40, 3), np.uint8))
        data = data[: len(data) // 2] if i == 1 else data
        (tmp_path / f"{i}.jpg").write_bytes(data)
    streams = {"ood": Stream(open_source(f"folder:{tmp_path}"), labels=False)}
    settings = {"batch_size": 4, "image_shape": (40, 40, 3)}
    with train_batches(streams, **settings) as batches:
        images = next(batches)["x_ood"]
        assert batches.bad_images == {"ood": (str(tmp_path / "1.jpg"),)}
    assert len({image.tobytes() for image in images}) == 3


def test_too_many_bad_images_stop_with_their_names(flat_folder):
    source = open_source(f"folder:{flat_folder(12, bad=(1, 4, 8))}")
    streams = {"ood": Stream(source, labels=False)}
    take(4, streams, max_bad_images=3)
    with pytest.raises(UserError, match=r"3 images.* 2 are tolerated.*001\.png"):
        take(4, streams, max_bad_images=2)


def test_nothing_decodable_stops(flat_folder):
    source = open_source(f"folder:{flat_folder(3, bad=(0, 1, 2))}")
    with pytest.raises(UserError, match="3 images cannot be decoded"):
        take(1, {"ood": Stream(source, labels=False)})


# --- Evaluation -----------------------------------------------------------------------


def evaluate(source, **settings):
    settings = {
        "preprocess": "",
        "batch_size": 4,
        "image_shape": (8, 8, 3),
        **settings,
    }
    with eval_batches(source, **settings) as batches:
        return list(batches)


def test_evaluation_is_in_order_and_fills_the_last_batch():
    batches = evaluate(numbered(10))
    assert len(batches) == 3
    for batch in batches:
        assert batch["images"].shape == (4, 8, 8, 3)
        assert batch["labels"].dtype == np.int32 and batch["mask"].dtype == bool
    assert levels(batches, "images") == [*range(10), 0, 0]
    assert batches[2]["mask"].tolist() == [True, True, False, False]
    assert batches[2]["labels"].tolist() == [3, 4, 0, 0]


def test_source_without_a_decodable_image_is_refused(flat_folder):
    source = open_source(f"folder:{flat_folder(2, bad=(0, 1))}")
    with pytest.raises(UserError, match="none of all images can be decoded"):
        materialise(source, "", (8, 8, 3))


def test_limit_reaches_every_class_of_a_sorted_source():
    images = np.zeros((40, 8, 8, 3), np.uint8)
    source = ArraySource(images, np.arange(40) // 10)
    _, labels = materialise(source, "", (8, 8, 3), limit=4)
    assert labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("limit, count", [(1, 1), (4, 4), (7, 7), (99, 10)])
def test_evaluation_limit_takes_so_many(limit, count):
    masks = [batch["mask"] for batch in evaluate(numbered(10), limit=limit)]
    assert np.concatenate(masks).sum() == count
    assert len(masks) == -(-count // 4)


@pytest.mark.parametrize("images", [3, 10, 12])
def test_evaluation_parts_join_to_the_global_batches(images):
    whole = evaluate(numbered(images))
    parts = [
        evaluate(numbered(images), process_index=p, process_count=2) for p in (0, 1)
    ]
    joined = [
        {key: np.concatenate([a[key], b[key]]) for key in a}
        for a, b in zip(*parts, strict=True)
    ]
    assert_equal(joined, whole)


def test_evaluation_masks_bad_images(flat_folder):
    source = open_source(f"folder:{flat_folder(6, bad=(1,))}")
    with eval_batches(
        source, preprocess="", batch_size=6, image_shape=(8, 8, 3)
    ) as batches:
        batch = next(batches)
        assert batch["mask"].tolist() == [True, False, True, True, True, True]
        assert batch["labels"].tolist() == [-1, 0, -1, -1, -1, -1]
        assert [name[-7:] for name in batches.bad_images["images"]] == ["001.png"]
    with pytest.raises(UserError, match="001.png"):
        evaluate(source, max_bad_images=0)


def test_evaluation_preprocesses():
    batch = evaluate(numbered(4, size=16), preprocess="resize(8)")[0]
    assert levels([batch], "images") == [0, 1, 2, 3]


def test_materialise_gathers_decodable_images_from_the_whole_source(flat_folder):
    images, labels = materialise(numbered(100), "", (8, 8, 3), limit=70)
    spread = np.arange(70) * 100 // 70
    assert images[:, 0, 0, 0].tolist() == spread.tolist()
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    np.testing.assert_array_equal(labels, spread % 5)
    source = open_source(f"folder:{flat_folder(6, bad=(1,))}")
    images, labels = materialise(source, "", (8, 8, 3))
    assert images.shape == (5, 8, 8, 3) and labels.tolist() == [-1] * 5


def test_next_image_stands_in_for_one_that_cannot_be_decoded(flat_folder):
    source = open_source(f"folder:{flat_folder(8, bad=(1, 4, 5, 7))}")
    images, make_rng = Images(source, parse(""), (8, 8, 3)), np.random.default_rng
    read = [images.first_good(i, make_rng, 9) for i in range(8)]
    levels = [int(image[0, 0, 0]) // 5 for (image, _), _ in read]
    assert levels == [0, 2, 2, 3, 6, 6, 6, 0]
    assert [bad for _, bad in read if bad >= 0] == [1, 4, 5, 7]
    with pytest.raises(UserError, match="are tolerated.*00[0-9].png"):
        images.first_good(4, make_rng, 1)


def test_images_too_thin_to_be_resized_are_counted_as_bad(tmp_path):
    for name, shape in (("a", (8, 8)), ("b", (1, 60_000)), ("c", (9, 8))):
        Image.fromarray(np.full(shape, 9, np.uint8)).save(tmp_path / f"{name}.png")
    source = open_source(f"folder:{tmp_path}")
    thin = "resize(292)|flip|center_crop(8)"
    with eval_batches(
        source, preprocess=thin, batch_size=3, image_shape=(8, 8, 3)
    ) as batches:
        assert next(batches)["mask"].tolist() == [True, False, True]
        assert [name[-5:] for name in batches.bad_images["images"]] == ["b.png"]
    streams = {"gen": Stream(source, thin, labels=False)}
    with pytest.raises(UserError, match="b.png"):
        take(2, streams, max_bad_images=0)
    assert len(take(2, streams)) == 2
